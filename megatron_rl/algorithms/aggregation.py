"""How token losses become one number, independent of how sequences are put into micro-batches."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


def token_weights(
    lengths: Int[Tensor, "batch"],
    aggregation: Aggregation,
    kept: Bool[Tensor, "tokens"] | None = None,
    longest: int = 1,
) -> Float[Tensor, "tokens"]:
    """Weights such that `sum(weights * token_losses)` is the aggregated loss of a whole mini-batch.

    Computed once for the global mini-batch and cut along with it: the sum over micro-batches and data-parallel ranks
    is then the same number however the sequences are split.

    - token-mean: every token counts the same (DAPO, arXiv 2503.14476, equation 8);
    - seq-mean-token-sum: tokens are summed, sequences averaged;
    - seq-mean-token-sum-norm: the same divided by the constant `longest` (Dr. GRPO, arXiv 2503.20783, appendix A);
    - seq-mean-token-mean: tokens are averaged, then sequences (GRPO, arXiv 2402.03300, equation 3).

    Args:
        lengths: response lengths of all sequences of the mini-batch. Sequences of length 0 own no weight and do not
            count as sequences.
        aggregation: one of the four.
        kept: False for tokens that a correction rejected; None: all are kept. Rejected tokens have weight 0, and sums
            and means are what they would be if these tokens did not exist.
        longest: most tokens that a response can have.

    Returns:
        float32 weights of all response tokens, sequence after sequence.
    """
    if kept is None:
        kept = torch.ones(int(lengths.sum()), dtype=torch.bool)
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    counts = torch.bincount(sequence[kept], minlength=len(lengths))
    present = (counts > 0).sum().clamp(min=1)
    if aggregation == "token-mean":
        per_sequence = torch.ones_like(counts, dtype=torch.float64) / counts.sum().clamp(min=1)
    elif aggregation == "seq-mean-token-sum":
        per_sequence = torch.ones_like(counts, dtype=torch.float64) / present
    elif aggregation == "seq-mean-token-sum-norm":
        per_sequence = torch.ones_like(counts, dtype=torch.float64) / (present * longest)
    else:
        per_sequence = 1.0 / (present.double() * counts.clamp(min=1))
    return per_sequence.float()[sequence] * kept
