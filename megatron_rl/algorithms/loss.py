"""The clipped policy-gradient loss, per token."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before `exp`: beyond it the ratio says nothing, and float32 overflows at 88."""


def safe_exp(log_ratio: Float[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    """`exp` of log-ratios clamped to +-`MAX_LOG_RATIO` (no gradient beyond it)."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


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
    return clipped_loss(safe_exp(new - old), advantages, clip_low, clip_high, dual_clip)


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
