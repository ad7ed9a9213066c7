"""What the engines and the trainer of a run start to draft with."""

from typing import TYPE_CHECKING

from megatron_rl.config import Config
from megatron_rl.distributed.coordinator import Coordinator
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.drafting.initial_head import folder_for_engines, initial_head
from megatron_rl.drafting.online_drafter import Drafting, frozen_policy
from megatron_rl.trainer.trainer import Trainer

if TYPE_CHECKING:
    from rollout.fleet.fleet import RolloutFleet


def engine_head(config: Config, runtime: Runtime) -> str | None:
    """On the driver, the folder of the head that engines start with; None elsewhere, and where none is used.

    Raises:
        ConfigError: when the head cannot be used.
    """
    return folder_for_engines(config) if runtime.is_driver and config.rollout.speculation.uses_head else None


def build_drafting(
    config: Config, runtime: Runtime, policy: Trainer, coordinator: Coordinator, fleet: "RolloutFleet | None"
) -> Drafting | None:
    """The drafter of a run, with the head that it starts from, or None where none is used.

    The engines get this head by `Drafting.start`.

    Raises:
        ConfigError: when the head cannot be used.
    """
    if not config.rollout.speculation.uses_head:
        return None
    head = initial_head(config, frozen_policy(policy.weights, policy.vocab_limit))
    return Drafting(config, runtime, policy, head, coordinator, fleet)
