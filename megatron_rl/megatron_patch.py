"""What is mended in megatron-core, for the versions it was seen in: two functions, around checkpoints.

- `DistributedOptimizer._set_main_param_and_optimizer_states`: without Transformer Engine or Apex the distributed
  optimizer stands on torch's Adam, whose per-parameter `step` is not part of a "fully reshardable" checkpoint; this
  function asks for it all the same.
- `filesystem_async._get_write_results_queue`: starts a manager process per rank (which imports torch, seconds of work)
  so that an asynchronous writer can report back; our saves are synchronous and stay in one process.

Beside them, what torch reads of a checkpoint is restricted to data (`megatron_rl.safe_reading`).
"""

import queue
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_rl import megatron_version, safe_reading

_original_set_states = DistributedOptimizer._set_main_param_and_optimizer_states
_results: queue.SimpleQueue[Any] = queue.SimpleQueue()


def _set_states_and_keep_step(self: DistributedOptimizer, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
    group, order = self.model_param_group_index_map[model_param]
    state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
    kept = {"step": state["step"]} if "step" in state else {}
    _original_set_states(self, model_param, tensors | kept)


def install() -> None:
    """Patch the two functions. Idempotent.

    Raises:
        RuntimeError: for a megatron-core version this was not tested with.
    """
    megatron_version.check("saving checkpoints")
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_states_and_keep_step
    filesystem_async._get_write_results_queue = lambda: _results
    safe_reading.install()
