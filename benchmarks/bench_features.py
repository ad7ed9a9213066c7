"""What tapping the policy's hidden states costs the pass that computes old log-probs.

    python benchmarks/bench_features.py [--quick] [--json FILE]

`tapped_vs_plain` is the time of a pass that feeds a drafter (planning, hooks, copies to the host, the store, and the
frozen copy of embedding and output layer) over that of the same pass without one: of the larger model, with the default
`drafter.tokens_per_step`. "all" taps every token instead. One process, one thread; batches of long-tailed responses,
the ratio is the median over pairs of neighbouring passes.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from _common import finish, parse_arguments
from _model import long_tailed_lengths
from drafter.eagle.head import EagleHead, HeadConfig
from drafter.training.feature_store import FeatureStore
from megatron_rl.config import Config
from megatron_rl.config.model_fit import read_hf_config
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.drafting.online_drafter import FeatureSupply, frozen_policy
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.scratch import make_scratch_model
from megatron_rl.models.weights import PolicyWeights
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.policy import Policy

MODELS = {
    "2.4 M": {"hidden_size": 192, "layers": 6, "heads": 6, "kv_heads": 2, "head_dim": 32, "ffn_hidden_size": 512},
    "25 M": {"hidden_size": 512, "layers": 8, "heads": 8, "kv_heads": 4, "head_dim": 64, "ffn_hidden_size": 1408},
}
PROMPT_TOKENS, LONGEST = 16, 512


def responses(count: int) -> Batch:
    """Made-up ones."""
    lengths = long_tailed_lengths(count, LONGEST)
    texts = [[5 + (i * 7 + j) % 90 for j in range(length)] for i, length in enumerate(lengths)]
    prompts = [[3 + number % 90] * PROMPT_TOKENS for number in range(count)]
    return Batch(prompts, texts)


def experiment(folder: Path, scratch: dict[str, int]) -> Config:
    """One process with packed micro-batches."""
    config = Config.model_validate(
        {
            "model": {"path": str(folder / "model"), "precision": "fp32", "scratch": scratch},
            "data": {"max_prompt_tokens": PROMPT_TOKENS},
            "rollout": {"max_tokens": LONGEST},
            "train": {"tokens_per_microbatch": 2048},
            "run_dir": str(folder / "run"),
        }
    )
    make_scratch_model(config.model.path, config.model.scratch)
    return config


def compare(policy: Policy, batch: Batch, pairs: int) -> dict[str, float]:
    """Seconds of a plain pass, and the ratios of tapped ones to the plain ones beside them."""
    head = EagleHead(HeadConfig.for_policy(read_hf_config(policy.config.model.path)))
    settings, weights = policy.config.drafter, PolicyWeights(policy.model, policy.arch)
    store = FeatureStore(settings.memory_mb * 2**20, settings.tokens_per_slice)
    supply = FeatureSupply(policy, head, store)

    def seconds(tokens: int | None, step: int) -> float:
        start = time.perf_counter()
        if tokens is None:
            policy.logprobs(batch)
        else:
            with supply.recording(batch, step, tokens):
                policy.logprobs(batch)
            frozen_policy(weights, policy.vocab_limit)
        return time.perf_counter() - start

    plain, bounded, everything = [], [], []
    for step in range(pairs + 1):
        plain.append(seconds(None, step))
        bounded.append(seconds(settings.tokens_per_step, step) / plain[-1])
        everything.append(seconds(10**9, step) / plain[-1])
    return {
        "pass [ms]": 1e3 * statistics.median(plain[1:]),
        "tapped / plain": statistics.median(bounded[1:]),
        "all / plain": statistics.median(everything[1:]),
        "kept [MiB]": store.bytes / 2**20,
    }


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(1)
    rows = []
    runtime = None
    for name, scratch in MODELS.items():
        folder = Path(tempfile.mkdtemp(prefix="megatron-rl-bench-"))
        config = experiment(folder, scratch)
        runtime = runtime or initialize(config)
        arch = Architecture.from_folder(config.model.path)
        policy = Policy(config, runtime, arch, arch.vocab_size, 1.0)
        batch = responses(64 if arguments.quick else 192)
        tokens = sum(batch.sequence_length(index) for index in range(len(batch.prompts)))
        rows.append({"model": name, "tokens": tokens, **compare(policy, batch, 3 if arguments.quick else 7)})
    shutdown()
    finish(arguments, {"tapped_vs_plain": float(rows[-1]["tapped / plain"])}, rows)


if __name__ == "__main__":
    main()
