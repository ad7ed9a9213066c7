"""The trainer's log-probs and entropies: the native operators beside the same in torch, and the reading of the logits.

    python benchmarks/bench_logprobs.py [--quick] [--json FILE]

`fused` are the native operators, `torch` the functions that other devices use, `chunks` the latter with temporaries
that fit the L2 cache. `+` adds the gradient of log-probs and entropies to the forward pass. `amax` is one
`logits.amax(-1)`. All times are in milliseconds. The program starts itself again in the environment of trainer
processes: where glibc does not keep memory, fresh pages for the gradient take longer than its computation.

The ratios are of forward and backward together, torch / fused: `fused_vs_torch` is the worst over vocabularies from
32,000, `fused_vs_torch_small` the worst over a vocabulary of 64 with 2,048 rows. `amax_multiple` is fused forward /
amax, the worst over float32 logits with a vocabulary from 32,000.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from _common import finish, measure, parse_arguments
from megatron_rl.distributed.device import shared_environment
from megatron_rl.models import vocab_parallel_logprobs

Shape = tuple[int, int]  # rows, vocabulary
SHAPES: list[Shape] = [(512, 64), (2048, 64), (512, 32_000), (2048, 32_000), (128, 152_000), (512, 152_000)]
QUICK: list[Shape] = [(2048, 64), (512, 32_000), (128, 152_000)]
LARGE = 32_000
SMALL_CHUNKS = 2**18  # float32 temporaries of 1 MiB
OPERATORS = torch.ops.megatron_rl
NATIVE = (OPERATORS.token_logprob_sums, OPERATORS.token_logprob_gradient)
IN_TORCH = (vocab_parallel_logprobs.sums_in_torch, vocab_parallel_logprobs.gradient_in_torch)


def forward(functions: Any, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Normalizers and entropies, as the trainer computes them from one slice."""
    maxima, sums = functions[0](logits, tokens, 0.9, logits.shape[1])
    log_sums = sums[0].log()
    return maxima + log_sums, log_sums - sums[1] / sums[0]


def both(functions: Any, logits: Tensor, tokens: Tensor, upstream: Tensor) -> Tensor:
    """Forward and backward."""
    common = forward(functions, logits, tokens)
    return functions[1](logits, tokens, *common, upstream, upstream, 0.9, logits.shape[1])


def in_small_chunks(run: Callable[[], Any]) -> Any:
    """Run the torch functions with another size of their temporaries."""
    usual, vocab_parallel_logprobs.CHUNK_ELEMENTS = vocab_parallel_logprobs.CHUNK_ELEMENTS, SMALL_CHUNKS
    try:
        return run()
    finally:
        vocab_parallel_logprobs.CHUNK_ELEMENTS = usual


def make_cases(rows: int, vocab: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """What is timed for one shape."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(rows, vocab).normal_(0, 2.5, generator=generator).to(dtype)
    tokens = torch.randint(0, vocab, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator)
    in_torch = partial(both, IN_TORCH, logits, tokens, upstream)
    torch.testing.assert_close(both(NATIVE, logits, tokens, upstream), in_torch(), atol=1e-4, rtol=1e-2)
    return {
        "amax": lambda: logits.amax(-1),
        "fused": partial(forward, NATIVE, logits, tokens),
        "torch": partial(forward, IN_TORCH, logits, tokens),
        "fused+": partial(both, NATIVE, logits, tokens, upstream),
        "torch+": in_torch,
        "chunks+": partial(in_small_chunks, in_torch),
    }


@torch.inference_mode()
def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(__doc__)
    if not shared_environment().items() <= os.environ.items():
        os.environ.update(shared_environment())
        os.execv(sys.executable, [sys.executable, *sys.argv])
    rows: list[dict[str, Any]] = []
    for count, vocab in QUICK if arguments.quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            # Small ones take less than a scheduler's time slice: only many repetitions tell something.
            repetitions = (3 if arguments.quick else 7) if vocab >= LARGE else 101
            seconds = measure(make_cases(count, vocab, dtype), repetitions)
            row: dict[str, Any] = {"rows": count, "vocab": vocab, "dtype": str(dtype).removeprefix("torch.")}
            row |= {name: 1e3 * value for name, value in seconds.items()}
            row["ratio"] = seconds["torch+"] / seconds["fused+"]
            row["/ amax"] = seconds["fused"] / seconds["amax"]
            rows.append(row)
    large = [row for row in rows if row["vocab"] >= LARGE]
    small = [row for row in rows if (row["rows"], row["vocab"]) == (2048, 64)]
    ratios = {
        "fused_vs_torch": min(row["ratio"] for row in large),
        "fused_vs_torch_small": min(row["ratio"] for row in small),
        "amax_multiple": max(row["/ amax"] for row in large if row["dtype"] == "float32"),
    }
    finish(arguments, ratios, rows)


if __name__ == "__main__":
    main()
