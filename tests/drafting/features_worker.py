"""Taps a tiny model in one parallel layout, packed and one sequence at a time: features_worker MODEL TP PP OUTPUT."""

import sys
from pathlib import Path

import torch

from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.drafting.feature_tap import FeatureTap, plan_windows
from megatron_rl.drafting.online_drafter import frozen_policy
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.weights import PolicyWeights
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.policy import Policy
from tests.hf_models import VOCAB, random_sequences
from tests.models.parity_worker import TEMPERATURE, make_config

AUX_LAYERS = (0, 1, 2, 3)
WINDOW = 24  # shorter than most sequences
CUT = 90  # rows of the output layer that are kept of 99


def main() -> None:
    model, tp, pp, output = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    config = make_config(model, tp, pp)
    runtime = initialize(config)
    arch = Architecture.from_folder(model)
    policy = Policy(config, runtime, arch, VOCAB, TEMPERATURE)
    tap = FeatureTap(policy, AUX_LAYERS)
    batch = Batch(*random_sequences(12))
    windows = plan_windows(batch, 3, WINDOW, 10_000, seed=0)
    results = {}
    for name, budget in {"packed": 128, "single": 1}.items():
        policy.config = config.model_copy(
            update={"train": config.train.model_copy(update={"tokens_per_microbatch": budget})}
        )
        with tap.recording(batch, windows):
            logprobs = policy.logprobs(batch)
        results[name] = {"logprobs": logprobs, "rows": [(w, vars(row)) for w, row in tap.take()]}
        policy.logprobs(batch)
        assert not any(tap._taken.values()), "recorded outside of `recording`"
    weights = PolicyWeights(policy.model, arch)
    frozen, cut = frozen_policy(weights, arch.vocab_size), frozen_policy(weights, CUT)
    torch.save({**results, "policy": vars(frozen), "cut": vars(cut)}, output / f"rank{runtime.rank}.pt")
    shutdown()


if __name__ == "__main__":
    main()
