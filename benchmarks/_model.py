"""A model with random weights for benchmarks, its trainer in this process, and a fleet of one engine."""

import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config import Config
from megatron_rl.distributed import device
from megatron_rl.distributed.coordinator import Coordinator
from megatron_rl.distributed.runtime import Runtime, initialize, shutdown
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.scratch import make_scratch_model
from megatron_rl.models.token_ids import load_tokenizer, read_token_ids
from megatron_rl.trainer.fleet_start import FleetConnection, start_fleet
from megatron_rl.trainer.trainer import Trainer
from megatron_rl.trainer.weight_sync import WeightSync
from rollout.fleet.fleet import RolloutFleet
from rollout.types import RolloutRequest


@dataclass
class Bench:
    """What a benchmark works with."""

    config: Config
    runtime: Runtime
    trainer: Trainer
    fleet: RolloutFleet
    weight_sync: WeightSync
    connection: FleetConnection

    def close(self) -> None:
        """Take everything down."""
        self.connection.shutdown()
        shutdown()


def build(scratch: dict[str, Any], **sections: dict[str, Any]) -> Bench:
    """Trainer, engine and weight sync for a `model.scratch`; `sections` are further sections of the config."""
    folder = Path(tempfile.mkdtemp(prefix="megatron-rl-bench-"))
    config = Config.model_validate(
        {
            "model": {"path": str(folder / "model"), "precision": "fp32", "scratch": scratch},
            "run_dir": str(folder / "run"),
            **sections,
            # Compiling would take longer than the benchmark, and changes neither weights nor log-probs.
            "rollout": sections.get("rollout", {}) | {"vllm": {"enforce_eager": True}},
        }
    )
    for name, value in device.process_environment(config, 1).items():
        os.environ.setdefault(name, value)
    make_scratch_model(config.model.path, config.model.scratch)
    runtime = initialize(config)
    arch = Architecture.from_folder(config.model.path)
    tokens = read_token_ids(config.model.path, load_tokenizer(config.model.path), arch.vocab_size)
    trainer = Trainer(config, runtime, arch, tokens.limit, config.rollout.temperature)
    connection = start_fleet(config, runtime, Coordinator(runtime), tokens)
    sync = connection.connect(trainer.weights)
    assert connection.engines is not None, "benchmarks have one process, which is the driver"
    return Bench(config, runtime, trainer, connection.engines, sync, connection)


def long_tailed_lengths(count: int, longest: int) -> list[int]:
    """Response lengths of reasoning: log-normal with a few very long ones, the same at every call."""
    generator = random.Random(0)
    return [min(max(int(generator.lognormvariate(0, 0.8) * longest / 8), 2), longest) for _ in range(count)]


def requests(prompts: list[list[int]], max_tokens: int, samples: int) -> list[RolloutRequest]:
    """`samples` requests per prompt, with seeds of their own."""
    return [
        RolloutRequest(str(number), sample, 0, number * samples + sample, prompt, max_tokens, 1.0)
        for number, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
