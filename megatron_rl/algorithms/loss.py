"""The clipped policy-gradient loss, per token."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are bounded by +-20 before `exp`: beyond it the ratio says nothing, and float32 overflows at 88."""


def safe_exp(log_ratio: Float[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    """`exp` of log-ratios clamped to +-`MAX_LOG_RATIO`: for values without a gradient, which would vanish beyond."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def bounded_exp(log_ratio: Float[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    """`exp`, and above `MAX_LOG_RATIO` its tangent there: a gradient that is bounded, and never has another sign."""
    near = log_ratio.clamp(max=MAX_LOG_RATIO)
    return near.exp() * (1 + log_ratio - near)


def ppo_loss(
    new: Float[Tensor, "tokens"],
    old: Float[Tensor, "tokens"],
    advantages: Float[Tensor, "tokens"],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
    """`-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)` with `r = exp(new - old)`.

    For A < 0 the loss is bounded by `-dual_clip A`. Sources: PPO, arXiv 1707.06347, equation 7; two clip ranges,
    DAPO, arXiv 2503.14476, equation 10; dual clip, arXiv 1912.09729, equation 5.

    Args:
        new: log-probs of the tokens under the policy being trained; gradients flow through them.
        old: log-probs under the policy before this update, without gradients.
        advantages: one per token.
        clip_low: lower clip range, in (0, 1].
        clip_high: upper clip range, > 0.
        dual_clip: the bound c > 1; None: no bound.

    Returns:
        The loss of every token, and a mask of the tokens whose gradient the clipping removed.
    """
    return clipped_loss(bounded_exp(new - old), advantages, clip_low, clip_high, dual_clip)


def clipped_loss(
    ratio: Float[Tensor, "tokens"],
    advantages: Float[Tensor, "tokens"],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
    """`ppo_loss` of a given ratio, through which gradients flow."""
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    plain, bounded = -ratio * advantages, -clipped_ratio * advantages
    loss = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if dual_clip is not None:
        bound = -dual_clip * advantages
        dual = (advantages < 0) & (loss > bound)
        loss = torch.where(dual, bound, loss)
        clipped = clipped | dual
    return loss, clipped


def kl_estimate(
    new: Float[Tensor, "tokens"], ref: Float[Tensor, "tokens"], estimator: Literal["k1", "k2", "k3"]
) -> Float[Tensor, "tokens"]:
    """Estimate of KL(new || ref) from tokens that `new` sampled, with `d = new - ref`.

    | estimator | value           | gradient                  |
    |-----------|-----------------|---------------------------|
    | k1        | d               | d * grad(new)             |
    | k2        | d^2 / 2         | d * grad(new)             |
    | k3        | exp(-d) - 1 + d | (1 - exp(-d)) * grad(new) |

    Values: Schulman, "Approximating KL divergence" (2020): k1 and k3 are unbiased, k2 and k3 never negative.
    Gradients: Tang and Munos, "On a few pitfalls in KL divergence gradient estimation for RL", arXiv 2506.09477.
    Differentiating k1 itself gives `grad(new)`, whose expectation is 0: no penalty at all. k1 therefore keeps its
    value but takes the gradient of k2, which is an unbiased gradient of KL(new || ref). The gradient of k3, used
    by GRPO (arXiv 2402.03300, equation 4), is that of KL(ref || new); the two agree while d is small. Below d = -20
    its `exp` goes on as a straight line: the pull towards the reference stays as strong, instead of turning round.

    Args:
        new: log-probs under the policy being trained; gradients flow through them.
        ref: log-probs under the reference, without gradients.
        estimator: k1, k2 or k3.

    Returns:
        One estimate per token.
    """
    difference = new - ref
    if estimator == "k3":
        return bounded_exp(-difference) - 1 + difference
    k2 = difference**2 / 2
    return k2 if estimator == "k2" else difference.detach() + k2 - k2.detach()


Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
Denominator = Literal["kept", "all"]


def token_weights(
    lengths: Int[Tensor, "batch"],
    aggregation: Aggregation,
    kept: Bool[Tensor, "tokens"] | None = None,
    longest: int = 1,
    denominator: Denominator = "kept",
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
        kept: False for tokens that a correction rejected, whose weight is 0; None: all are kept.
        longest: most tokens that a response can have.
        denominator: what sums are divided by, `algorithm.correction.denominator`. kept: the number of tokens or
            responses that are left, as if the rejected ones did not exist; all: that of all of them.

    Returns:
        float32 weights of all response tokens, sequence after sequence.
    """
    if kept is None:
        kept = torch.ones(int(lengths.sum()), dtype=torch.bool)
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    counts = torch.bincount(sequence[kept] if denominator == "kept" else sequence, minlength=len(lengths))
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
