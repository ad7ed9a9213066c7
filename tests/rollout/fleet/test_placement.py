"""Engines on the trainer's GPUs: each has its own."""

import pytest

from megatron_rl.config import ConfigError
from rollout.fleet.placement import assign_gpus, options_on_shared_gpus

GPUS = ["0", "1", "2", "3"]


def nodes(*addresses: str) -> list[dict]:
    return [
        {"NodeID": address.encode().hex().zfill(56), "NodeManagerAddress": address, "Alive": address != "10.0.0.9"}
        for address in addresses
    ]


@pytest.mark.parametrize(("tp_size", "engines"), [(1, 8), (2, 4), (4, 2), (3, 2)])
def test_no_two_engines_share_a_gpu(tp_size: int, engines: int) -> None:
    assigned = [assign_gpus(index, tp_size, GPUS) for index in range(engines)]
    taken = [(node, gpu) for node, own in assigned for gpu in own]
    assert len(taken) == len(set(taken)) == engines * tp_size
    assert {node for node, _ in assigned} == {0, 1}


def test_an_engine_gets_its_node_and_its_gpus() -> None:
    strategy, variables = options_on_shared_gpus(3, 2, GPUS, nodes("10.0.0.9", "10.0.0.2", "10.0.0.1"))
    assert strategy.node_id == b"10.0.0.2".hex().zfill(56) and not strategy.soft
    assert variables["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_engines_without_room_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.engines is more than 4.* at most 4"):
        options_on_shared_gpus(4, 2, GPUS, nodes("10.0.0.1", "10.0.0.2"))
    with pytest.raises(ConfigError, match=r"rollout\.tp_size=8, but a node has 4 GPUs"):
        assign_gpus(0, 8, GPUS)
