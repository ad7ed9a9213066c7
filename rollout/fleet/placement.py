"""Placement of engines that share the trainer's GPUs.

Ray would give every engine with a fraction of a GPU the first one, and an engine of two GPUs only one. So each engine
is pinned to a node and to GPUs here; all nodes have the same GPUs.
"""

from collections.abc import Sequence
from typing import Any

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatron_rl.config import ConfigError


def assign_gpus(index: int, tp_size: int, gpus: Sequence[str]) -> tuple[int, list[str]]:
    """The number of the node of an engine, and its GPUs there; no two engines share one.

    Args:
        index: of the engine in the fleet.
        tp_size: its number of GPUs.
        gpus: ids of a node's GPUs.

    Raises:
        ConfigError: a node has too few GPUs for one engine.
    """
    per_node = len(gpus) // tp_size
    if not per_node:
        raise ConfigError(
            f"rollout.tp_size={tp_size}, but a node has {len(gpus)} GPUs, and an engine has to be on one node; set it "
            f"to at most {len(gpus)}."
        )
    node, slot = divmod(index, per_node)
    return node, list(gpus[slot * tp_size : (slot + 1) * tp_size])


def options_on_shared_gpus(index: int, tp_size: int, gpus: Sequence[str], nodes: Sequence[dict[str, Any]]) -> Any:
    """Ray's options for an engine: (scheduling strategy, environment variables).

    Args:
        index: of the engine in the fleet.
        tp_size: its number of GPUs.
        gpus: ids of a node's GPUs, as in CUDA_VISIBLE_DEVICES.
        nodes: as `ray.nodes()` gives them.

    Raises:
        ConfigError: the nodes have no room for this engine.
    """
    node, own = assign_gpus(index, tp_size, gpus)
    alive = sorted((n for n in nodes if n["Alive"]), key=lambda n: (n["NodeManagerAddress"], n["NodeID"]))
    if node >= len(alive):
        fitting = len(alive) * (len(gpus) // tp_size)
        raise ConfigError(
            f"rollout.engines is more than {fitting}: so many colocated engines of rollout.tp_size={tp_size} fit on "
            f"{len(alive)} nodes of {len(gpus)} GPUs; set it to at most {fitting}."
        )
    variables = {"CUDA_VISIBLE_DEVICES": ",".join(own), "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    return NodeAffinitySchedulingStrategy(alive[node]["NodeID"], soft=False), variables
