"""The one defect of megatron-core that is mended here, for the versions it was seen in.

Without Transformer Engine or Apex the distributed optimizer stands on torch's Adam, whose per-parameter `step` is not part of
a "fully reshardable" checkpoint; `DistributedOptimizer._set_main_param_and_optimizer_states` asks for it all the same.
"""

from typing import Any

import megatron.core
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

TESTED_MEGATRON_CORE = ("0.16.",)

_original = DistributedOptimizer._set_main_param_and_optimizer_states


def _set_states_and_keep_step(self: DistributedOptimizer, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
    group, order = self.model_param_group_index_map[model_param]
    state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
    kept = {"step": state["step"]} if "step" in state else {}
    _original(self, model_param, tensors | kept)


def install() -> None:
    """Patch `DistributedOptimizer._set_main_param_and_optimizer_states`. Idempotent.

    Raises:
        RuntimeError: for a megatron-core version this was not tested with.
    """
    if not megatron.core.__version__.startswith(TESTED_MEGATRON_CORE):
        raise RuntimeError(
            f"resuming was not tested with megatron-core {megatron.core.__version__}; install a version that starts "
            f"with {' or '.join(TESTED_MEGATRON_CORE)}."
        )
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_states_and_keep_step
