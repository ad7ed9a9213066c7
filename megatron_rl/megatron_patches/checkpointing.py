"""What is mended in megatron-core around checkpoints, for the versions that need it.

Beside that, what torch reads of a checkpoint is restricted to data (`megatron_rl.megatron_patches.safe_loading`).
"""

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_rl.megatron_patches import safe_loading
from megatron_rl.megatron_patches.versions import patch

_original_set_states = DistributedOptimizer._set_main_param_and_optimizer_states
_writer: Any = filesystem_async
_results: queue.SimpleQueue[Any] = queue.SimpleQueue()


def _set_states_and_keep_step(self: DistributedOptimizer, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
    group, order = self.model_param_group_index_map[model_param]
    state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
    kept = {"step": state["step"]} if "step" in state else {}
    _original_set_states(self, model_param, tensors | kept)


def _write_in_threads(
    transforms: list[Any],
    use_msc: bool,
    rank: int,
    write_buckets: Sequence[Any],
    results: queue.SimpleQueue[Any],
) -> None:
    """Write each bucket to its file; `results` gets what every one of them wrote, or the first error."""
    written: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    under_way: queue.Queue[int] = queue.Queue()

    def write(number: int) -> None:
        under_way.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, write_buckets[number], written, under_way, use_fsync=True, use_msc=use_msc
        )

    with ThreadPoolExecutor(len(write_buckets)) as threads:
        list(threads.map(write, range(len(write_buckets))))
    by_bucket = dict(sorted(written.get() for _ in write_buckets))
    errors = [result for result in by_bucket.values() if isinstance(result, Exception)]
    results.put(errors[0] if errors else by_bucket)


@patch(">=0.16.1,<0.20")
def keep_adam_steps() -> None:
    """Loading leaves the `step` of torch's Adam as it is.

    Without Transformer Engine or Apex the distributed optimizer stands on torch's Adam, whose per-parameter `step` is
    not part of a "fully reshardable" checkpoint; megatron-core asks for it all the same.
    """
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_states_and_keep_step


@patch(">=0.16.1,<0.17")
def collect_results_in_this_process() -> None:
    """Saves start no manager process (which imports torch, seconds of work) to report back from a writer process.

    Our saves are synchronous and stay in one process.
    """
    _writer._get_write_results_queue = lambda: _results


@patch(">=0.17,<0.20")
def collect_results_in_this_process_renamed() -> None:
    """The same, as later versions call it."""
    _writer.get_write_results_queue = lambda mp_mode="spawn": _results


@patch(">=0.16.1,<0.17")
def write_in_threads() -> None:
    """Saves fork no process per file, as later versions do not either (NVIDIA/Megatron-LM pull request 3633).

    That hangs when one of this process's many threads (Ray's, gRPC's, torch's) held a lock at that moment.
    """
    _writer.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_in_threads)


PATCHES = (
    keep_adam_steps,
    collect_results_in_this_process,
    collect_results_in_this_process_renamed,
    write_in_threads,
)


def install() -> None:
    """Apply the patches for the installed version. Idempotent.

    Raises:
        ConfigError: for a megatron-core version that is not supported.
    """
    for apply in PATCHES:
        apply()
    safe_loading.install()
