"""From `algorithm.name` to the algorithm."""

from megatron_rl.algorithms.base import CriticAlgorithm, PolicyAlgorithm
from megatron_rl.algorithms.cispo import Cispo
from megatron_rl.algorithms.grpo import Grpo
from megatron_rl.algorithms.gspo import Gspo
from megatron_rl.algorithms.ppo import Ppo
from megatron_rl.algorithms.reinforce_pp import ReinforcePP, ReinforcePPBaseline
from megatron_rl.algorithms.rloo import Rloo
from megatron_rl.config.algorithm import AlgorithmConfig
from megatron_rl.config.errors import ConfigError
from megatron_rl.config.import_path import import_object

BUILTIN: dict[str, type[PolicyAlgorithm | CriticAlgorithm]] = {
    "grpo": Grpo,
    "dr_grpo": Grpo,
    "dapo": Grpo,
    "rloo": Rloo,
    "reinforce_pp": ReinforcePP,
    "reinforce_pp_baseline": ReinforcePPBaseline,
    "gspo": Gspo,
    "cispo": Cispo,
    "ppo": Ppo,
}
"""What settings these have is in `megatron_rl.config.algorithm.PRESETS`."""


def load_algorithm(settings: AlgorithmConfig) -> PolicyAlgorithm | CriticAlgorithm:
    """The algorithm that `settings.name` names: built-in, or a user's class as `package.module:Class`.

    Args:
        settings: the section `algorithm`; the algorithm is built from it as `Class(settings)`.

    Raises:
        ConfigError: when there is no such class, it is not an algorithm that can be built, or other settings do not go
            with it.
    """
    found = BUILTIN.get(settings.name) or _users_class(settings)
    if settings.kl.place == "reward" and not issubclass(found, CriticAlgorithm):
        raise ConfigError(
            f"algorithm.kl.place=reward needs an algorithm with rewards of tokens, such as ppo, but algorithm.name="
            f"{settings.name}; set place to loss."
        )
    return found(settings)


def needs_critic(settings: AlgorithmConfig) -> bool:
    """Whether a critic is trained beside the policy.

    Raises:
        ConfigError: as `load_algorithm`.
    """
    return isinstance(load_algorithm(settings), CriticAlgorithm)


def _users_class(settings: AlgorithmConfig) -> type[PolicyAlgorithm | CriticAlgorithm]:
    module_name, _, class_name = settings.name.partition(":")
    try:
        found = import_object(settings.name)
    except ValueError as error:
        raise ConfigError(f"algorithm.name={settings.name}: {error}.") from error
    if not isinstance(found, type) or not issubclass(found, PolicyAlgorithm | CriticAlgorithm):
        raise ConfigError(
            f"algorithm.name={settings.name}: {module_name} has no class {class_name} derived from "
            "megatron_rl.algorithms.PolicyAlgorithm or CriticAlgorithm."
        )
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise ConfigError(f"algorithm.name={settings.name}: {class_name} does not define {', '.join(missing)}.")
    return found
