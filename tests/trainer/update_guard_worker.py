"""Updates a tiny model with a response whose advantage is not a number among the others.

finite_worker MODEL TP PP OUTPUT
"""

import copy
import sys
from pathlib import Path

import torch

from megatron_rl.algorithms import load_algorithm
from megatron_rl.config import Config
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.models.architecture import Architecture
from megatron_rl.trainer.batch import Batch, with_values
from megatron_rl.trainer.trainer import Trainer
from tests.hf_models import VOCAB, random_sequences

LIMIT = 3


def main() -> None:
    model, tp, pp, output = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    config = Config.model_validate(
        {
            "model": {"path": str(model), "precision": "fp32"},
            "parallel": {"tp_size": tp, "pp_size": pp},
            "data": {"max_prompt_tokens": 64},
            "rollout": {"max_tokens": 64},
            "train": {
                "tokens_per_microbatch": 128,
                "lr": 1e-3,
                "weight_decay": 0.1,
                "max_skipped_updates": LIMIT,
            },
            "run_dir": "unused",
        }
    )
    runtime = initialize(config)
    trainer = Trainer(config, runtime, Architecture.from_folder(model), VOCAB, 1.0)
    algorithm = load_algorithm(config.algorithm)
    batch = Batch(*random_sequences(8))
    old = trainer.logprobs(batch)
    good = with_values(batch, old_logprobs=old, rollout_logprobs=old, advantages=torch.ones(batch.tokens))
    advantages = torch.ones(batch.tokens)
    advantages[0] = torch.nan  # one token, which one data-parallel rank sees
    bad = with_values(good, advantages=advantages)

    def state() -> list[torch.Tensor]:
        weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        inner = [optimizer.optimizer.state_dict()["state"] for optimizer in trainer.optimizer.chained_optimizers]
        moments = [value for part in inner for values in part.values() for value in values.values()]
        return weights + [copy.deepcopy(value) for value in moments if isinstance(value, torch.Tensor)]

    def update(batch: Batch) -> dict:
        before = state()
        metrics = trainer.update(batch, algorithm).metrics
        after = state()
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        return {"metrics": metrics, "same": same, "finite": all(bool(value.isfinite().all()) for value in after)}

    # Two in a row are survived, and a good one in between starts the count again.
    steps = [update(part) for part in (good, bad, bad, good, bad, bad)]
    sentence = ""
    try:
        trainer.update(bad, algorithm)
    except RuntimeError as error:
        sentence = str(error)
    torch.save({"steps": steps, "sentence": sentence}, output / f"rank{runtime.rank}.pt")
    shutdown()


if __name__ == "__main__":
    main()
