"""Updates a tiny model once, with and without weight decay, and saves its weights by their names.

decay_worker MODEL OUTPUT
"""

import sys
from pathlib import Path

import torch

from megatron_rl.config import Config
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.models.architecture import Architecture
from megatron_rl.trainer.batch import Batch, with_values
from megatron_rl.trainer.critic import Critic
from megatron_rl.trainer.trainer import Trainer
from tests.hf_models import VOCAB, random_sequences

DECAYS = {"none": {}, "usual": {"weight_decay": 0.5}, "all": {"weight_decay": 0.5, "decay_all": True}}


def main() -> None:
    model, output = Path(sys.argv[1]), Path(sys.argv[2])

    def make_config(options: dict) -> Config:
        return Config.model_validate(
            {
                "model": {"path": str(model), "precision": "fp32"},
                "data": {"max_prompt_tokens": 64},
                "rollout": {"max_tokens": 64},
                "algorithm": {"name": "ppo", "critic": {"lr": 1e-2}},
                "train": {"tokens_per_microbatch": 128, "lr": 1e-2, **options},
                "run_dir": "unused",
            }
        )

    runtime = initialize(make_config({}))
    arch = Architecture.from_folder(model)
    batch = Batch(*random_sequences(4))
    scored = with_values(batch, values=torch.zeros(batch.tokens), returns=torch.ones(batch.tokens))
    found: dict[str, dict[str, dict[str, torch.Tensor]]] = {"policy": {}, "critic": {}}
    for name, options in DECAYS.items():
        policy = Trainer(make_config(options), runtime, arch, VOCAB, 1.0)
        policy.imitate(batch)
        critic = Critic(make_config(options), runtime, arch)
        critic.update(scored)
        for kind, trained in (("policy", policy), ("critic", critic)):
            found[kind][name] = {key: value.detach().clone() for key, value in trained.model.named_parameters()}
    torch.save(found, output)
    shutdown()


if __name__ == "__main__":
    main()
