"""The engines' processes in Ray."""

import os
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from megatron_rl.config import ConfigError
from rollout.engine import plugin
from rollout.engine.engine import RolloutEngine
from rollout.engine.engine_arguments import EngineEnvironment
from rollout.fleet.placement import options_on_shared_gpus


def engine_variables(environment: EngineEnvironment) -> dict[str, str]:
    """Environment of an engine's process: the plugin's settings, and where to import this package from."""
    source = str(Path(__file__).resolve().parents[2])
    search_path = [source, *filter(None, [environment.env.get("PYTHONPATH", os.environ.get("PYTHONPATH"))])]
    return {
        "VLLM_LOGGING_LEVEL": "ERROR",
        # An engine's workers are all on one node, so they communicate where no other node can connect.
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_HOST_IP": "127.0.0.1",
        **environment.env,
        "PYTHONPATH": os.pathsep.join(search_path),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        plugin.ENABLE: "1",
        plugin.VOCAB_LIMIT: str(environment.vocab_limit),
    }


def create_engine(environment: EngineEnvironment, arguments: tuple[Any, ...], index: int, tp_size: int) -> Any:
    """A Ray actor with a `RolloutEngine`, whose `start` is still to be called.

    Args:
        environment: the machine.
        arguments: of `RolloutEngine`.
        index: of the engine in the fleet.
        tp_size: its GPUs.

    Raises:
        ConfigError: the machine has no room for the engine.
    """
    strategy: Any = "SPREAD"  # over the nodes, where Ray's default fills the first one
    variables = engine_variables(environment)
    if environment.shared_gpus:
        strategy, own = options_on_shared_gpus(index, tp_size, environment.shared_gpus, ray.nodes())
        variables |= own
    options: dict[str, Any] = {
        "num_cpus": 0,  # cores are shared out by thread counts, in `environment.env`
        "num_gpus": environment.gpus,
        "scheduling_strategy": strategy,
        "max_restarts": 0,  # the fleet restarts an engine, because it also has to give it the weights
        "runtime_env": {"env_vars": variables},
    }
    return ray.remote(RolloutEngine).options(**options).remote(*arguments)


def wait_until_up(index: int, start: Any) -> int:
    """Wait for an engine's `start`; returns how many requests it can run at the same time.

    Args:
        index: of the engine in the fleet, for messages.
        start: Ray's reference to the call of `RolloutEngine.start`.

    Raises:
        ConfigError: vLLM refuses an option.
        RuntimeError: the engine does not start for another reason.
    """
    try:
        max_requests: int = ray.get(start)
        return max_requests
    except ConfigError as error:
        raise ConfigError(str(error.cause)) from None  # type: ignore[attr-defined]  # Ray adds a traceback to it
    except RayError as error:
        raise RuntimeError(f"Rollout engine {index} did not start: {error}") from error
