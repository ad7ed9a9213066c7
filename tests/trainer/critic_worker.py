"""Trains a policy and its critic for some updates, from a checkpoint when there is one.

critic_worker MODEL TP PP RUN_DIR STEPS SAVE_AT OUTPUT
"""

import sys
from pathlib import Path

import torch

from megatron_rl.config import Config
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.weights import export_hf
from megatron_rl.trainer.batch import Batch, with_values
from megatron_rl.trainer.checkpoint import latest_step, load_checkpoint, save_checkpoint
from megatron_rl.trainer.critic import Critic
from megatron_rl.trainer.trainer import Trainer
from tests.hf_models import SHAPE, VOCAB, random_sequences

WARMUP = 2
"""Steps before the policy's first, so that a checkpoint finds its optimizer as new."""


def make_config(model: Path, tp: int, pp: int, run_dir: str) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model), "precision": "fp32"},
            "parallel": {"tp_size": tp, "pp_size": pp},
            "algorithm": {"name": "ppo", "critic": {"lr": 3e-3, "clip": 0.5}},
            "data": {"max_prompt_tokens": 64},
            "rollout": {"max_tokens": 64},
            "train": {
                "tokens_per_microbatch": 128,
                "lr": 1e-3,
                "steps": 10,
                "num_minibatches": 2,
                "prompts_per_step": 12,
            },
            "run_dir": run_dir,
        }
    )


def head_weights() -> torch.Tensor:
    """Those of the value head before the first update, so that not all values are 0; [1, hidden]."""
    return torch.randn(1, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(7)) / 16


def fixed_returns(tokens: int) -> torch.Tensor:
    """What the critic is to learn; [tokens]."""
    return torch.rand(tokens, generator=torch.Generator().manual_seed(8))


def main() -> None:
    model, run_dir, output = Path(sys.argv[1]), sys.argv[4], Path(sys.argv[7])
    tp, pp, steps, save_at = (int(sys.argv[i]) for i in (2, 3, 5, 6))
    config = make_config(model, tp, pp, run_dir)
    runtime = initialize(config)
    arch = Architecture.from_folder(model)
    trainer, critic = Trainer(config, runtime, arch, VOCAB, 1.0), Critic(config, runtime, arch)
    batch = Batch(*random_sequences(12))
    at_first = critic.values(batch)
    if critic.model.post_process:
        with torch.no_grad():
            critic.model.output_layer.weight.copy_(head_weights())
    before, metrics = critic.values(batch), []
    batch = with_values(batch, values=before, returns=fixed_returns(batch.tokens))
    done = latest_step(run_dir)
    if done:
        load_checkpoint(trainer, run_dir, done, critic)
    for step in range(done or 0, steps):
        metrics.append(critic.update(batch))
        if step + 1 > WARMUP:
            trainer.imitate(batch)
        if step + 1 == save_at:
            save_checkpoint(trainer, run_dir, step + 1, 1, critic=critic)
    result = {"at_first": at_first, "before": before, "after": critic.values(batch), "metrics": metrics}
    if runtime.is_driver:
        torch.save(result, output.with_suffix(".pt"))
    export_hf(trainer.weights, model, output)
    shutdown()


if __name__ == "__main__":
    main()
