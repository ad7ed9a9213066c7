"""Trains a tiny model for some updates, from a checkpoint when there is one.

checkpoint_worker MODEL TP PP RUN_DIR STEPS SAVE_AT OUTPUT [PRECISION [EP]]
"""

import os
import sys
from pathlib import Path

import torch

from megatron_rl.config import Config
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.weights import export_hf
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.checkpoint import latest_step, load_checkpoint, save_checkpoint
from megatron_rl.trainer.trainer import Trainer
from tests.hf_models import VOCAB, random_sequences


def main() -> None:
    model, run_dir, output = Path(sys.argv[1]), sys.argv[4], Path(sys.argv[7])
    tp, pp, steps, save_at = (int(sys.argv[i]) for i in (2, 3, 5, 6))
    precision = sys.argv[8] if len(sys.argv) > 8 else "fp32"
    ep = int(sys.argv[9]) if len(sys.argv) > 9 else 1
    config = Config.model_validate(
        {
            "model": {"path": str(model), "precision": precision},
            "parallel": {"tp_size": tp, "pp_size": pp, "ep_size": ep},
            "data": {"max_prompt_tokens": 64},
            "rollout": {"max_tokens": 64},
            "train": {
                "tokens_per_microbatch": 128,
                "lr": 1e-3,
                "steps": 10,
                "warmup_steps": 4,
                "lr_schedule": "cosine",
            },
            "run_dir": run_dir,
        }
    )
    runtime = initialize(config)
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(os.getpid()))
    trainer = Trainer(config, runtime, Architecture.from_folder(model), VOCAB, 1.0)
    done = latest_step(run_dir)
    if done:
        load_checkpoint(trainer, run_dir, done)
    prompts, responses = random_sequences(24)
    for step in range(done or 0, steps):
        metrics = trainer.imitate(Batch(prompts[step * 4 : step * 4 + 4], responses[step * 4 : step * 4 + 4]))
        if runtime.is_driver:
            print(f"step {step} {metrics}")
        if step + 1 == save_at:
            forks.clear()
            save_checkpoint(trainer, run_dir, step + 1, 1, {"rank": torch.distributed.get_rank()})
            assert not forks, "a fork beside other threads may hang"
    export_hf(trainer.weights, model, output)
    shutdown()


if __name__ == "__main__":
    main()
