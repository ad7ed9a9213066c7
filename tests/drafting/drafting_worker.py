"""Updates a tiny model for some steps with a drafter beside it.

drafting_worker MODEL RUN_DIR STEPS SAVE_AT OUTPUT

Runs all steps, resumes from the checkpoint of SAVE_AT and runs the rest again, and runs others with idle time filled.
"""

import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from megatron_rl.config import Config
from megatron_rl.distributed.coordinator import Coordinator
from megatron_rl.distributed.runtime import Runtime, initialize, shutdown
from megatron_rl.drafting.initial_head import initial_head
from megatron_rl.drafting.online_drafter import CHECKPOINT_NAME, Drafting, frozen_policy
from megatron_rl.drafting.tail_filler import TailFiller
from megatron_rl.models.architecture import Architecture
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.checkpoint import latest_step, load_checkpoint, load_state, save_checkpoint
from megatron_rl.trainer.trainer import Trainer
from tests.hf_models import VOCAB, random_sequences
from tests.models.parity_worker import make_config


class FakeFleet:
    """Remembers what was pushed."""

    def __init__(self) -> None:
        self.pushed: list[tuple[int, dict[str, torch.Tensor]]] = []

    def update_drafter(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        self.pushed.append((version, {name: value.clone() for name, value in tensors.items()}))


def settings(model: Path, **drafter: object) -> Config:
    config = make_config(model, 1, 2).model_dump()
    options = {"lr": 3e-3, "unroll": 3, "tokens_per_slice": 48, **drafter}
    return Config.model_validate(config | {"drafter": options})


def slow_rollouts(count: int) -> Iterator[int]:
    for number in range(count):
        time.sleep(0.05)
        yield number + 1


def generate(tail: TailFiller) -> list[int]:
    return list(tail.watch(slow_rollouts(8), 8))


def run_steps(config: Config, runtime: Runtime, run_dir: str, steps: int, save_at: int) -> dict:
    trainer = Trainer(config, runtime, Architecture.from_folder(config.model.path), VOCAB, 1.0)
    coordinator, fleet = Coordinator(runtime), FakeFleet() if runtime.is_driver else None
    head = initial_head(config, frozen_policy(trainer.weights, VOCAB))
    drafting = Drafting(config, runtime, trainer, head, coordinator, fleet)
    done = latest_step(run_dir) or 0
    if done:
        load_checkpoint(trainer, run_dir, done)
        drafting.restore(load_state(run_dir, done, CHECKPOINT_NAME))
    drafting.start()
    prompts, responses = random_sequences(96)
    metrics = []
    for step in range(done + 1, steps + 1):
        if drafting.tail is not None:
            assert coordinator.drive(partial(generate, drafting.tail)) == list(range(1, 9))
        batch = Batch(prompts[step * 16 - 16 : step * 16], responses[step * 16 - 16 : step * 16])
        with drafting.recording(batch, step):
            trainer.logprobs(batch)
        trainer.imitate(batch)
        metrics.append(drafting.finish_step(step, 1.0, 100, {}))
        if step == save_at:
            save_checkpoint(trainer, run_dir, step, 1, {CHECKPOINT_NAME: drafting.state()})
    Path(run_dir).mkdir(exist_ok=True)
    drafting.timeline.write(Path(run_dir))
    weights = {"head": drafting.head.state_dict(), "live": drafting.live.head.state_dict()}
    return {**weights, "metrics": metrics, "pushed": fleet.pushed if fleet is not None else []}


def main() -> None:
    model, run_dir, output = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[5])
    steps, save_at = int(sys.argv[3]), int(sys.argv[4])
    exact = settings(model, fill=[], min_slices=3)
    runtime = initialize(exact)
    results = {
        "exact": run_steps(exact, runtime, run_dir, steps, save_at),
        "resumed": run_steps(exact, runtime, run_dir, steps, 0),
        "filled": run_steps(settings(model, fill=["bubbles", "tails"]), runtime, run_dir + "-none", 6, 0),
    }
    output.mkdir(exist_ok=True)
    torch.save(results, output / f"rank{runtime.rank}.pt")
    shutdown()


if __name__ == "__main__":
    main()
