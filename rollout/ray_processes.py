"""Ray, and the engines' processes in it."""

import logging
import os
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from megatron_rl.config import ConfigError
from rollout import plugin
from rollout.engine import EngineEnvironment, RolloutEngine

# For requests and rollouts (the policy's weights travel otherwise); Ray's own default is 30 % of the memory.
_OBJECT_STORE_BYTES = 128 * 2**20
# Old and new weights of the EAGLE head come on top. Without the room they work too, but Ray writes them to disk.
_HEADS_IN_STORE = 2


def start_ray(head_bytes: int = 0) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start a Ray on this node whose store has room for such heads."""
    # Ray starts its workers with a lower priority than the trainer that shares the cores with them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=_OBJECT_STORE_BYTES + _HEADS_IN_STORE * head_bytes,
    )


def engine_variables(environment: EngineEnvironment) -> dict[str, str]:
    """Environment of an engine's process: the plugin's settings, and where to import this package from."""
    source = str(Path(__file__).resolve().parent.parent)
    search_path = [source, *filter(None, [environment.env.get("PYTHONPATH", os.environ.get("PYTHONPATH"))])]
    return {
        "VLLM_LOGGING_LEVEL": "ERROR",
        **environment.env,
        "PYTHONPATH": os.pathsep.join(search_path),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        plugin.ENABLE: "1",
        plugin.VOCAB_LIMIT: str(environment.vocab_limit),
    }


def create_engine(environment: EngineEnvironment, arguments: tuple[Any, ...]) -> Any:
    """A Ray actor with the `RolloutEngine` of these arguments, which is yet to be started."""
    options: dict[str, Any] = {
        "num_cpus": 0,  # cores are shared out by thread counts, in `environment.env`
        "num_gpus": environment.gpus,
        "scheduling_strategy": "SPREAD",  # over the nodes, where Ray's default fills the first one
        "max_restarts": 0,  # an engine is useless until it has been given the weights, so the fleet restarts it
        "runtime_env": {"env_vars": engine_variables(environment)},
    }
    return ray.remote(RolloutEngine).options(**options).remote(*arguments)


def wait_until_up(index: int, start: Any) -> int:
    """Wait for an engine's `start`; returns how many requests it can run at the same time.

    Raises ConfigError for options that vLLM refuses, RuntimeError when it does not start for another reason.
    """
    try:
        max_requests: int = ray.get(start)
        return max_requests
    except ConfigError as error:
        raise ConfigError(str(error.cause)) from None  # type: ignore[attr-defined]  # Ray adds a traceback to it
    except RayError as error:
        raise RuntimeError(f"Rollout engine {index} did not start: {error}") from error
