"""Runs all tiny models under one parallel layout and saves what this rank computed.

parity_worker ROOT TP PP OUTPUT MODELS
"""

import sys
from pathlib import Path

import torch
from megatron.core.distributed import finalize_model_grads

from megatron_rl.algorithms import token_weights
from megatron_rl.config import Config
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.weights import PolicyWeights
from megatron_rl.trainer.batch import Batch, with_values
from megatron_rl.trainer.trainer import Trainer
from tests.hf_models import VOCAB, random_sequences

TEMPERATURE = 0.8


def make_config(
    path: Path, tp: int, pp: int, cp: int = 1, ep: int = 1, family: str | None = None, **train: object
) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(path), "precision": "fp32", "family": family},
            "parallel": {"tp_size": tp, "pp_size": pp, "cp_size": cp, "ep_size": ep},
            "data": {"max_prompt_tokens": 64},
            "rollout": {"max_tokens": 64},
            "train": {"tokens_per_microbatch": 128, "lr": 1e-3, "clip_grad": 1e6, **train},
            "run_dir": "unused",
        }
    )


def gradients(trainer: Trainer, batch: Batch) -> list[tuple[str, tuple[slice, ...], torch.Tensor]]:
    """Gradients of the mean negative log-likelihood: this rank's pieces under Hugging Face names."""
    batch = with_values(batch, weights=token_weights(batch.lengths, "token-mean"))

    def loss(microbatch, logprobs, entropies):
        return -(microbatch.values["weights"] * logprobs).sum(), {}

    # Reduce-scattered gradients would be whole on no rank.
    trainer.model.config.finalize_model_grads_func = lambda *arguments, **options: finalize_model_grads(
        *arguments, **(options | {"force_all_reduce": True})
    )
    trainer.ddp.train()
    trainer.ddp.zero_grad_buffer()
    trainer._run(batch, loss, forward_only=False, progress=None)
    weights = PolicyWeights(trainer.model, trainer.arch)
    weights.live = {name: parameter.main_grad for name, parameter in trainer.model.named_parameters()}
    return [(name, index, value.clone()) for name, index, value in weights.pieces()]


def main() -> None:
    root, tp, pp, output = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    batch = Batch(*random_sequences(12))
    runtime = initialize(make_config(root / "qwen3", tp, pp))
    results = {}
    for name in sys.argv[5].split(","):
        config = make_config(root / name, tp, pp)
        arch = Architecture.from_folder(root / name)
        trainer = Trainer(config, runtime, arch, VOCAB, TEMPERATURE)
        logits: list[torch.Tensor] = []
        if trainer.model.post_process:
            hook = trainer.model.output_layer.register_forward_hook(
                lambda layer, inputs, outputs, logits=logits: logits.append(outputs[0].detach().clone())
            )
        one_row = Batch(batch.prompts[:1], batch.responses[:1])
        trainer.logprobs(one_row)
        if trainer.model.post_process:
            hook.remove()
        result = {"logits": logits, "logprobs": trainer.logprobs(batch), "gradients": gradients(trainer, batch)}
        # The same sequences, one per micro-batch.
        single = config.train.model_copy(update={"tokens_per_microbatch": 1})
        trainer.config = config.model_copy(update={"train": single})
        result["logprobs_one_by_one"] = trainer.logprobs(batch)
        result["gradients_one_by_one"] = gradients(trainer, batch)
        results[name] = result
    torch.save(results, output / f"rank{runtime.rank}.pt")
    shutdown()


if __name__ == "__main__":
    main()
