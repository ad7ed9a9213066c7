"""What is mended in megatron-core, for the versions it was seen in: three functions, around checkpoints.

- `DistributedOptimizer._set_main_param_and_optimizer_states`: without Transformer Engine or Apex the distributed
  optimizer stands on torch's Adam, whose per-parameter `step` is not part of a "fully reshardable" checkpoint; this
  function asks for it all the same.
- `filesystem_async._get_write_results_queue`: starts a manager process per rank (which imports torch, seconds of work)
  so that an asynchronous writer can report back; our saves are synchronous and stay in one process.
- `FileSystemWriterAsync.write_preloaded_data_multiproc`: forks a process per file, which hangs when one of this
  process's many threads (Ray's, gRPC's, torch's) held a lock at that moment. Later versions write in threads, too
  (NVIDIA/Megatron-LM pull request 3633).

Beside them, what torch reads of a checkpoint is restricted to data (`megatron_rl.megatron_patches.safe_loading`).
"""

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_rl.megatron_patches import safe_loading, versions

_original_set_states = DistributedOptimizer._set_main_param_and_optimizer_states
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


def install() -> None:
    """Patch the three functions. Idempotent.

    Raises:
        RuntimeError: for a megatron-core version this was not tested with.
    """
    versions.check("saving checkpoints")
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_states_and_keep_step
    filesystem_async._get_write_results_queue = lambda: _results
    filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_in_threads)
    safe_loading.install()
