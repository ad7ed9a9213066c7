"""Updates a tiny model over two pipeline stages, unfilled and then filled, and saves its log-probs and weights.

trainer_worker MODEL OUTPUT
"""

import sys
from pathlib import Path

import torch

from drafter.idle_time.slices import SliceRunner
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.drafting.wait_fill import idle_fill
from megatron_rl.models.architecture import Architecture
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.trainer import Trainer
from tests.drafter.idle_time.pipeline_worker import Work
from tests.hf_models import VOCAB, random_sequences
from tests.models.parity_worker import make_config


def main() -> None:
    model, output = Path(sys.argv[1]), Path(sys.argv[2])
    config = make_config(model, 1, 2)
    runtime = initialize(config)
    arch = Architecture.from_folder(model)
    results = []
    for filled in (False, True):
        trainer, work = Trainer(config, runtime, arch, VOCAB, 1.0), Work(None)
        bubbles = trainer.fill_bubbles(idle_fill(SliceRunner(work))) if filled else None
        batch = Batch(*random_sequences(12))
        metrics = [trainer.imitate(batch) for _ in range(3)]
        weights = [value.detach().clone() for value in trainer.model.parameters()]
        results.append({"metrics": metrics, "logprobs": trainer.logprobs(batch), "weights": weights})
    assert bubbles is not None
    results.append({"slices": work.done, "stats": vars(bubbles.take_stats())})
    torch.save(results, output / f"rank{runtime.rank}.pt")
    shutdown()


if __name__ == "__main__":
    main()
