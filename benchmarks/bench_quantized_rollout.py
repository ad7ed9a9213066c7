"""Decoding and weight sync of int8 engines beside bf16 and float32 ones, on this machine's CPU.

    python benchmarks/bench_quantized_rollout.py [--quick] [--json FILE]

Three engines hold the same random weights, which arrive in bf16 by one sync, and take turns. The models have the shape
of Qwen3 but a vocabulary of a hundred characters, so that nearly all time goes into the linear layers that int8 makes
smaller; engines run without compilation. `gap` is the mean absolute difference to the float32 engine's log-probs, over
tokens up to the first that differs; trained weights, which have outliers, give a larger one.
"""

import dataclasses
import os
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import ray
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta

from _common import finish, measure, parse_arguments
from _model import requests
from megatron_rl.config import Config
from megatron_rl.distributed.engine_environment import engine_environment
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_mapping import hf_shapes
from megatron_rl.models.scratch import make_scratch_model
from rollout.engine.engine import TimedGeneration
from rollout.fleet.fleet import RolloutFleet
from rollout.fleet.weight_client import FleetClient
from rollout.weight_transfer.connection import WeightConnection, connect
from rollout.weight_transfer.shm import ShardedWeightSource

ENGINES = {"fp32": ("fp32", "none"), "bf16": ("bf16", "none"), "int8": ("bf16", "int8")}
SHAPES = {
    "50m": {"hidden_size": 512, "layers": 12, "heads": 8, "kv_heads": 4, "head_dim": 64, "ffn_hidden_size": 2048},
    "150m": {"hidden_size": 768, "layers": 17, "heads": 12, "kv_heads": 4, "head_dim": 64, "ffn_hidden_size": 3072},
    "400m": {"hidden_size": 1024, "layers": 26, "heads": 16, "kv_heads": 8, "head_dim": 64, "ffn_hidden_size": 4096},
}
PROMPT = list(range(5, 13))


class RandomWeights(ShardedWeightSource):
    """bf16 weights of a model that was never trained: normal, norms 1."""

    def __init__(self, arch: Architecture) -> None:
        generator = torch.Generator().manual_seed(0)
        self._tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, arch.init_std, generator=generator)
            if len(shape) == 2
            else torch.ones(shape, dtype=torch.bfloat16)
            for name, shape in hf_shapes(arch).items()
        }

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and shape of every tensor."""
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._tensors.items()

    def pieces(self) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
        """All of it: there is one rank."""
        for name, tensor in self._tensors.items():
            yield name, tuple(slice(0, size) for size in tensor.shape), tensor


class Engines:
    """One engine per precision, with the same weights."""

    def __init__(self, size: str, batch: int, tokens: int) -> None:
        folder = Path(tempfile.mkdtemp(prefix="megatron-rl-bench-"))
        self.fleets: dict[str, RolloutFleet] = {}
        for name, (precision, quantization) in ENGINES.items():
            rollout = {"quantization": quantization, "vllm": {"enforce_eager": True, "max_num_seqs": batch}}
            config = Config.model_validate(
                {
                    "model": {"path": str(folder / "model"), "precision": precision, "scratch": SHAPES[size]},
                    "data": {"max_prompt_tokens": len(PROMPT)},
                    "rollout": rollout | {"max_tokens": tokens},
                    "run_dir": str(folder / name),
                }
            )
            if not self.fleets:
                make_scratch_model(config.model.path, config.model.scratch)
                arch = Architecture.from_folder(config.model.path)
                tokens = read_token_ids(config.model.path, load_tokenizer(config.model.path), arch.vocab_size)
            environment = engine_environment(config, tokens.limit, tokens.ends)
            self.fleets[name] = RolloutFleet(config, environment, config.model.path, lambda engine: None, wait=False)
        source = RandomWeights(arch)
        for fleet in self.fleets.values():
            fleet.wait_until_up()
        self.syncs = {name: _connect(fleet, source, name) for name, fleet in self.fleets.items()}
        for sync in self.syncs.values():
            sync.sync()

    def sync_seconds(self, repetitions: int) -> dict[str, float]:
        """Median seconds of a whole weight sync."""
        return measure({name: sync.sync for name, sync in self.syncs.items()}, repetitions)

    def decode(self, batch: int, tokens: int, repetitions: int) -> tuple[dict[str, float], dict[str, float]]:
        """Median tokens/s, and the log-probs' gap to those of float32, nats."""
        turns: dict[str, list[TimedGeneration]] = {name: [] for name in self.fleets}
        work = [dataclasses.replace(request, ignore_eos=True) for request in requests([PROMPT], tokens, batch)]
        cases = {name: partial(self._turn, fleet, work, turns[name]) for name, fleet in self.fleets.items()}
        measure(cases, repetitions)
        speed = {
            name: statistics.median(batch * tokens / turn.seconds for turn in done[1:]) for name, done in turns.items()
        }
        return speed, {name: _gap(done[-1], turns["fp32"][-1]) for name, done in turns.items()}

    @staticmethod
    def _turn(fleet: RolloutFleet, work: list, turns: list[TimedGeneration]) -> None:
        turns.append(ray.get(fleet.call(0, "generate_timed", work)))

    def close(self) -> None:
        """Take everything down; the fleet that started Ray goes last."""
        for sync in self.syncs.values():
            sync.shutdown()
        for fleet in reversed(self.fleets.values()):
            fleet.shutdown()


def _connect(fleet: RolloutFleet, source: RandomWeights, name: str) -> WeightConnection:
    segment = f"megatron-rl-bench-{os.getpid()}-{name}"
    return connect(
        "shm", rank=0, client=FleetClient(fleet), source=source, barrier=lambda: None, segment=segment, workers=1
    )


def _gap(turn: TimedGeneration, reference: TimedGeneration) -> float:
    expected = {rollout.sample_index: rollout for rollout in reference.rollouts}
    gaps = []
    for rollout in turn.rollouts:
        other = expected[rollout.sample_index]
        for token, other_token, here, there in zip(
            rollout.token_ids, other.token_ids, rollout.logprobs, other.logprobs, strict=True
        ):
            if token != other_token:
                break
            gaps.append(abs(here - there))
    return statistics.mean(gaps)


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(__doc__)
    sizes, batches = (["400m"], [1, 8]) if arguments.quick else (list(SHAPES), [1, 8, 32])
    tokens, repetitions = (8, 2) if arguments.quick else (32, 5)
    ratios: dict[str, float] = {}
    rows: list[dict[str, float | str]] = []
    for size in sizes:
        engines = Engines(size, max(batches), tokens)
        try:
            for batch in batches:
                speed, gap = engines.decode(batch, tokens, repetitions)
                for base in ("bf16", "fp32"):
                    ratios[f"int8_vs_{base}_{size}_b{batch}"] = speed["int8"] / speed[base]
                case = {"model": size, "case": f"decode, batch {batch}"}
                rows += [
                    case | {"engine": name, "tokens/s": speed[name], "gap [nats]": gap[name], "seconds": ""}
                    for name in ENGINES
                ]
            seconds = engines.sync_seconds(repetitions)
        finally:
            engines.close()
        case = {"model": size, "case": "weight sync"}
        rows += [
            case | {"engine": name, "tokens/s": "", "gap [nats]": "", "seconds": seconds[name]} for name in ENGINES
        ]
        ratios["int8_sync_vs_bf16_sync"] = seconds["int8"] / seconds["bf16"]  # that of the largest model stays
    finish(arguments, ratios, rows)


if __name__ == "__main__":
    main()
