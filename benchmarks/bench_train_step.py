"""The trainer's update with packed sequences beside padded ones, and how far its log-probs are from the engine's.

    python benchmarks/bench_train_step.py [--quick] [--json FILE]

`packing_vs_padding` compares real tokens per second of the same update on the same long-tailed responses: packed into
rows of `tokens_per_microbatch`, or each filled up to the longest of the batch. `logprob_gap_mean` is the mean
|trainer log-prob - engine log-prob| over responses that the engine has generated, float32.
"""

import torch

from _common import finish, measure, parse_arguments
from _model import Bench, build, long_tailed_lengths, requests
from megatron_rl.algorithms import load_algorithm
from megatron_rl.trainer.batch import Batch, with_values

MODEL = {"hidden_size": 192, "layers": 6, "heads": 6, "kv_heads": 2, "head_dim": 32, "ffn_hidden_size": 512}
PROMPT_TOKENS, LONGEST = 16, 128


def rl_batch(responses: list[list[int]], weights: list[list[float]]) -> Batch:
    """An update's batch over made-up responses; `weights` are per-token advantages, 0 on padding."""
    tokens = sum(map(len, responses))
    prompts = [list(range(3, 3 + PROMPT_TOKENS)) for _ in responses]
    logprobs = torch.full((tokens,), -1.0)
    batch = Batch(prompts, responses, {"rollout_logprobs": logprobs, "old_logprobs": logprobs})
    return with_values(batch, advantages=torch.tensor([weight for row in weights for weight in row]))


def packed_and_padded(count: int) -> tuple[Batch, Batch]:
    """The same responses as they are, and filled up to the longest."""
    lengths = long_tailed_lengths(count, LONGEST)
    responses = [[5 + (i * 7 + j) % 90 for j in range(length)] for i, length in enumerate(lengths)]
    longest = max(lengths)
    filled = [row + [0] * (longest - len(row)) for row in responses]
    weights = [[1.0] * length + [0.0] * (longest - length) for length in lengths]
    return rl_batch(responses, [[1.0] * length for length in lengths]), rl_batch(filled, weights)


def logprob_gap(bench: Bench, prompts: int) -> tuple[float, float, int]:
    """Mean and largest |trainer - engine| log-prob over generated tokens, and how many tokens."""
    bench.weight_sync.sync(1)
    texts = [[3 + (i * 11 + j) % 90 for j in range(PROMPT_TOKENS)] for i in range(prompts)]
    batch = Batch.from_rollouts(list(bench.fleet.generate(requests(texts, 64, samples=4))))
    delta = (bench.trainer.logprobs(batch) - batch.values["rollout_logprobs"]).abs()
    return float(delta.mean()), float(delta.max()), batch.tokens


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(__doc__)
    sections = {
        "data": {"max_prompt_tokens": PROMPT_TOKENS},
        "rollout": {"max_tokens": LONGEST},
        "train": {"tokens_per_microbatch": 4096, "lr": 1e-6},
    }
    bench = build(MODEL, **sections)
    try:
        gap_mean, gap_max, gap_tokens = logprob_gap(bench, prompts=8 if arguments.quick else 32)
        packed, padded = packed_and_padded(48 if arguments.quick else 256)
        algorithm = load_algorithm(bench.config.algorithm)
        cases = {
            "packing": lambda: bench.trainer.update(packed, algorithm),
            "padding": lambda: bench.trainer.update(padded, algorithm),
        }
        seconds = measure(cases, repetitions=3 if arguments.quick else 7)
    finally:
        bench.close()
    real = sum(packed.sequence_length(index) for index in range(len(packed.prompts)))
    rows = [
        {"case": name, "real tokens": real, "time [ms]": 1e3 * seconds[name], "tokens/s": real / seconds[name]}
        for name in cases
    ]
    print(f"log-prob gap over {gap_tokens} generated tokens: mean {gap_mean:.2e}, max {gap_max:.2e} nats")
    ratios = {"packing_vs_padding": seconds["padding"] / seconds["packing"], "logprob_gap_mean": gap_mean}
    finish(arguments, ratios, rows)


if __name__ == "__main__":
    main()
