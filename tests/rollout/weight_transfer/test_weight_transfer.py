"""Weights through shared memory: engines generate with them, hold their bits, and leave nothing behind."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta

from rollout.fleet.fleet import RolloutFleet
from rollout.fleet.weight_client import FleetClient
from rollout.weight_transfer.checksum import differing, source_checksums
from rollout.weight_transfer.connection import WeightConnection, connect, segment_name
from rollout.weight_transfer.shm import ShardedWeightSource, create_segment, map_segment, plan_segment, segment_bytes
from tests.launching import ROOT
from tests.rollout.helpers import make_config, make_environment, make_requests, tokens_by_key
from tests.rollout.tiny_models import make_model


class StateDictSource(ShardedWeightSource):
    """One rank of several that share a state dict: it holds every `ranks`-th row."""

    def __init__(self, weights: dict[str, Tensor], rank: int = 0, ranks: int = 1) -> None:
        self.weights, self.rank, self.ranks = weights, rank, ranks

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.items()

    def pieces(self) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
        for name, tensor in self.weights.items():
            rows = torch.arange(len(tensor)).tensor_split(self.ranks)[self.rank].tolist()
            if rows:
                index = (slice(rows[0], rows[-1] + 1), *(slice(0, size) for size in tensor.shape[1:]))
                yield name, index, tensor[index]

    def checksums(self) -> dict[str, int]:
        return source_checksums(self.pieces(), {name: tuple(t.shape) for name, t in self.weights.items()})


def connected(fleet: RolloutFleet, source: ShardedWeightSource, name: str) -> WeightConnection:
    return connect("shm", rank=0, client=FleetClient(fleet), source=source, barrier=_no_wait, segment=name, workers=1)


def _no_wait() -> None: ...


def _load(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_an_engine_with_sent_weights_generates_like_one_that_loaded_them(
    fleet: RolloutFleet, model: Path, other_model: Path, tmp_path: Path
) -> None:
    requests = make_requests(16)
    before = tokens_by_key(fleet, requests)
    source = StateDictSource(_load(other_model))
    sync = connected(fleet, source, segment_name(str(tmp_path)))
    report = sync.sync()
    assert report.bytes == sum(t.nbytes for t in source.weights.values()) and report.seconds > 0
    sent = tokens_by_key(fleet, requests)
    sent_sums = fleet.checksums()[0]

    source.weights = _load(model)
    sync.sync()
    assert tokens_by_key(fleet, requests) == before
    sync.shutdown()

    fresh = RolloutFleet(make_config(tmp_path, other_model), make_environment(), str(other_model), lambda index: None)
    try:
        assert tokens_by_key(fresh, requests) == sent != before
        assert fresh.checksums()[0] == sent_sums
    finally:
        fresh.shutdown()


def test_checksums_agree_after_a_sync_and_name_the_tensor_with_one_flipped_bit(
    fleet: RolloutFleet, model: Path, tmp_path: Path
) -> None:
    weights = _load(model)
    source = StateDictSource(dict(weights))
    truth = source.checksums()
    sync = connected(fleet, source, segment_name(str(tmp_path)))
    sync.sync()
    assert differing(truth, fleet.checksums()[0]) == []
    for name, tensor in weights.items():
        flipped = tensor.clone()
        flipped.view(torch.int32).view(-1)[-1] ^= 1  # the least significant bit of one element
        source.weights = {**weights, name: flipped}
        sync.sync()
        tied = ["lm_head.weight"] if name == "model.embed_tokens.weight" else []
        assert differing(truth, fleet.checksums()[0]) == sorted([name, *tied])
    source.weights = weights
    sync.sync()
    sync.shutdown()


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param({"tie_word_embeddings": False, "vocab_size": 100}, id="untied, padded vocabulary"),
        pytest.param({"model_type": "qwen2", "hidden_size": 128}, id="biases of q, k and v", marks=pytest.mark.slow),
    ],
)
def test_checksums_hold_for_other_architectures_in_bf16(architecture: dict, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", dtype=torch.bfloat16, **architecture)
    fleet = RolloutFleet(make_config(tmp_path, folder), make_environment("bfloat16"), str(folder), lambda index: None)
    try:
        weights = _load(folder)
        source = StateDictSource(dict(weights))
        truth = source.checksums()
        assert differing(truth, fleet.checksums()[0]) == []
        sync = connected(fleet, source, segment_name(str(tmp_path)))
        for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.v_proj.weight", list(weights)[-1]):
            flipped = weights[name].clone()
            flipped.view(torch.int16).view(-1)[-1] ^= 1
            source.weights = {**weights, name: flipped}
            sync.sync()
            assert name in differing(truth, fleet.checksums()[0])
        sync.shutdown()
    finally:
        fleet.shutdown()


def test_ranks_fill_the_segment_together(tmp_path: Path) -> None:
    weights = {"a": torch.randn(7, 3), "b": torch.randn(5).bfloat16(), "c": torch.randn(1)}
    slots = plan_segment(StateDictSource(weights).metadata())
    name = segment_name(str(tmp_path))
    owner = create_segment(name, segment_bytes(slots))
    try:
        for rank in range(3):
            mapped = map_segment(name, segment_bytes(slots))
            for piece, index, shard in StateDictSource(weights, rank, ranks=3).pieces():
                {slot.name: slot.view(mapped) for slot in slots}[piece][index].copy_(shard)
        mapped = map_segment(name, segment_bytes(slots))
        for slot in slots:
            assert torch.equal(slot.view(mapped), weights[slot.name])
    finally:
        owner.close()
        owner.unlink()


def test_a_segment_left_by_a_killed_run_is_replaced_and_none_remains(
    fleet: RolloutFleet, model: Path, tmp_path: Path
) -> None:
    name = segment_name(str(tmp_path))
    with open(f"/dev/shm/{name}", "wb") as stale:
        stale.write(b"left over")
    sync = connected(fleet, StateDictSource(_load(model)), name)
    sync.sync()
    sync.shutdown()
    assert name not in os.listdir("/dev/shm")


def test_a_sync_is_refused_while_requests_are_running(fleet: RolloutFleet, model: Path, tmp_path: Path) -> None:
    sync = connected(fleet, StateDictSource(_load(model)), segment_name(str(tmp_path)))
    stream = fleet.generate(make_requests(240, max_tokens=60))  # more than one poll can finish
    next(stream)
    with pytest.raises(RuntimeError, match="still running"):
        sync.sync()
    stream.close()
    sync.sync()  # closing the stream has aborted them
    sync.shutdown()


def test_an_unknown_backend_is_refused(fleet: RolloutFleet, model: Path) -> None:
    with pytest.raises(ValueError, match="not one of shm, ipc, nccl"):
        connect("tcp", rank=0, client=FleetClient(fleet), source=StateDictSource(_load(model)), barrier=_no_wait,
                segment="x", workers=1)  # fmt: skip


KILLED_TRACKER = """
import os, signal, sys
from multiprocessing import resource_tracker
from rollout.weight_transfer.shm import create_segment, remove_segment
segment = create_segment(sys.argv[1], 4096)
if sys.argv[2] == "killed":
    os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
remove_segment(segment)
assert not os.path.exists(f"/dev/shm/{sys.argv[1]}")
"""


@pytest.mark.parametrize("tracker", ["alive", "killed"])
def test_a_segment_goes_without_a_word_even_when_its_resource_tracker_was_killed(tracker: str) -> None:
    command = [sys.executable, "-c", KILLED_TRACKER, f"test-{os.getpid()}-{tracker}", tracker]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
