"""Updates a tiny model under every form of mismatch correction and saves what this rank computed.

correction_worker MODEL VALUES OUTPUT
"""

import sys
from pathlib import Path

import torch
from megatron.core.distributed import finalize_model_grads

from megatron_rl.algorithms import load_algorithm
from megatron_rl.config import Config
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.weights import PolicyWeights
from megatron_rl.trainer.batch import Batch, with_values
from megatron_rl.trainer.checkpoint import save_checkpoint
from megatron_rl.trainer.trainer import Trainer, UpdateResult
from tests.hf_models import VOCAB

FORMS = {
    "none": {"kind": "none"},
    "token-tis": {"normalize": True},
    "sequence-tis": {"level": "sequence", "normalize": True},
    "token-mask": {"kind": "mask", "floor": 0.5, "normalize": True},
    "token-mask-over-all": {"kind": "mask", "floor": 0.5, "denominator": "all"},
    "sequence-mask": {"kind": "mask", "level": "sequence", "floor": 0.5, "veto": 0.4},
    "geometric-mask": {"kind": "mask", "level": "geometric", "cap": 1.05, "floor": 0.95},
}
SCORED_IN_UPDATE = {"none": {"kind": "none"}, "token": {"cap": 1.1}, "sequence": {"level": "sequence"}}
ALGORITHMS = ("gspo", "cispo")  # the ratio of the response, and another loss
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def make_config(model: Path, correction: dict, lr: float = 1e-3, **algorithm: str) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model), "precision": "fp32"},
            "data": {"max_prompt_tokens": 64},
            "rollout": {"max_tokens": 64},
            "algorithm": {"correction": correction, "entropy_coef": 0.1, **algorithm},
            "train": {"tokens_per_microbatch": 128, "lr": lr, "weight_decay": 0.1, "clip_grad": 1e6},
            "run_dir": "unused",
        }
    )


def pieces(weights: PolicyWeights) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, _, value in weights.pieces()}


def gradients_of(trainer: Trainer) -> PolicyWeights:
    """This rank's gradients, which `pieces` copies by the names of the weights."""
    gradients = PolicyWeights(trainer.model, trainer.arch)
    gradients.live = {name: parameter.main_grad for name, parameter in trainer.model.named_parameters()}
    return gradients


def update(trainer: Trainer, batch: Batch) -> UpdateResult:
    return trainer.update(batch, load_algorithm(trainer.config.algorithm))


def corrected(trainer: Trainer, model: Path, batch: Batch) -> dict:
    """Per form, aggregation and micro-batch size: metrics of an update and this rank's pieces of its gradients.

    Those of `ALGORITHMS`, in the place of an aggregation, are of a policy that has moved since the rollouts.
    """
    gradients = gradients_of(trainer)
    # A learning rate that moves no weight: all cases see the same policy.
    configs = {
        (form, aggregation): make_config(model, correction, lr=1e-30, aggregation=aggregation)
        for form, correction in FORMS.items()
        for aggregation in (AGGREGATIONS if form == "token-mask" else AGGREGATIONS[:1])
    }
    configs |= {
        ("token-mask", name): make_config(model, FORMS["token-mask"], lr=1e-30, name=name) for name in ALGORITHMS
    }
    results = {}
    for case, config in configs.items():
        for tokens in (128, 1):
            train = config.train.model_copy(update={"tokens_per_microbatch": tokens})
            trainer.config = config.model_copy(update={"train": train})
            done = update(trainer, moved(batch) if case[1] in ALGORITHMS else batch)
            results[*case, tokens] = {"metrics": done.metrics, "gradients": pieces(gradients)}
    return results


def scored(trainer: Trainer, model: Path, batch: Batch) -> dict:
    """Per form, with old log-probs of a pass before the update, and without them: all that the update computed."""
    gradients = gradients_of(trainer)
    results = {}
    for form, correction in SCORED_IN_UPDATE.items():
        trainer.config = make_config(model, correction, lr=1e-30)
        rest = {name: value for name, value in batch.values.items() if name != "old_logprobs"}
        without = Batch(batch.prompts, batch.responses, rest)
        before = with_values(without, old_logprobs=trainer.logprobs(batch))
        for name, given in (("before", before), ("in update", without)):
            done = update(trainer, given)
            results[form, name] = {
                "metrics": done.metrics,
                "gradients": pieces(gradients),
                "old_logprobs": done.old_logprobs,
                "correction": done.correction.metrics(),
                "weights": done.correction.weights,
            }
    return results


def moved(batch: Batch) -> Batch:
    old = batch.values["old_logprobs"]
    return with_values(batch, old_logprobs=old + 0.2 * torch.sin(torch.arange(len(old))))


def out_of_reach(batch: Batch) -> Batch:
    return with_values(batch, rollout_logprobs=batch.values["old_logprobs"] + 50)


def rejected(trainer: Trainer, model: Path, batch: Batch) -> dict:
    """An update as usual, which gives the optimizer momentum, and one whose tokens are all rejected."""
    trainer.config = make_config(model, {"veto": 1e-3})
    usual = update(trainer, batch).metrics
    before = pieces(trainer.weights)
    metrics = update(trainer, out_of_reach(batch)).metrics
    after = pieces(trainer.weights)
    again = update(trainer, batch).metrics
    return {"usual": usual, "metrics": metrics, "before": before, "after": after, "again": again}


def main() -> None:
    model, values, output = (Path(argument) for argument in sys.argv[1:])
    batch = Batch(*torch.load(values))
    config = make_config(model, {})
    runtime = initialize(config)
    trainer = Trainer(config, runtime, Architecture.from_folder(model), VOCAB, 1.0)
    # Even a run that has rejected everything so far can be saved.
    trainer.config = make_config(model, {"veto": 1e-3})
    update(trainer, out_of_reach(batch))
    save_checkpoint(trainer, str(output / "run"), 1, 1)
    # Reduce-scattered gradients would be whole on no rank.
    trainer.model.config.finalize_model_grads_func = lambda *arguments, **options: finalize_model_grads(
        *arguments, **(options | {"force_all_reduce": True})
    )
    results = {
        "corrected": corrected(trainer, model, batch),
        "scored": scored(trainer, model, batch),
        "rejected": rejected(trainer, model, batch),
    }
    torch.save(results, output / f"rank{runtime.rank}.pt")
    shutdown()


if __name__ == "__main__":
    main()
