"""The difference between the engine that generated and the trainer that learns, and what is done about it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_rl.algorithms.loss import safe_exp
from megatron_rl.config.algorithm import CorrectionConfig


@dataclass(frozen=True)
class TokenCorrection:
    """What a correction makes of every response token; constants of the update, without gradient."""

    weights: Float[Tensor, "tokens"]
    """Importance weight of the token's loss; 0 for rejected tokens."""
    kept: Bool[Tensor, "tokens"]
    """False for rejected tokens, which have no part in the loss; `denominator` says whether its mean counts them."""
    clipped: Bool[Tensor, "tokens"]
    """Kept tokens whose weight was cut at the cap."""
    vetoed: Bool[Tensor, "batch"]
    """Responses that the veto rejected."""

    @classmethod
    def of_all(cls, parts: Sequence["TokenCorrection"]) -> "TokenCorrection":
        """What was made of the tokens of several mini-batches, one after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def metrics(self) -> dict[str, float]:
        """`weight_mean` (of the tokens kept), `clipped_fraction`, `rejected_fraction`, `vetoed_fraction`.

        The last is over responses, the others over response tokens. Of nothing the mean weight is 1 and the fractions
        are 0.
        """
        return {
            "weight_mean": self.weights[self.kept].double().mean().item() if self.kept.any() else 1.0,
            "clipped_fraction": _fraction(self.clipped),
            "rejected_fraction": _fraction(~self.kept),
            "vetoed_fraction": _fraction(self.vetoed),
        }


def correct_mismatch(
    old: Float[Tensor, "tokens"],
    rollout: Float[Tensor, "tokens"],
    lengths: Int[Tensor, "batch"],
    correction: CorrectionConfig,
    reused: Float[Tensor, "tokens"] | None = None,
) -> TokenCorrection:
    """Importance weights and rejections for one mini-batch, whole: `normalize` averages over all of it.

    The ratio `w` of a token is `exp(old - rollout)`; at level sequence, every token of a response has the product of
    the response's ratios, at level geometric their geometric mean. Log-ratios are bounded to +-20 before `exp`.

    - tis: the weight is `min(w, cap)` (Ionides, "Truncated importance sampling", 2008; for RL with another engine:
      Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025);
    - mask: the weight is `w`, and what lies outside [floor, cap] is rejected (IcePop, arXiv 2510.18855; sequence and
      geometric: Liu et al., "When speed kills stability", 2025);
    - veto: a response with a token whose ratio is below it is rejected whole, whatever the kind;
    - reused: tokens that the lenient rule kept of an earlier response are no samples of the engine's policy, so their
      ratio is only what it is for a fresh token. With mask and leave it counts as 1 in every product, mean and bound,
      and with mask these tokens are rejected;
    - normalize: weights are divided by their mean, after truncation, over what is kept: over tokens at level token,
      over responses otherwise.

    Args:
        old: the trainer's log-probs before the update.
        rollout: the engine's log-probs, of the distribution that was sampled.
        lengths: response lengths; they sum up to `tokens`.
        correction: the section `algorithm.correction`.
        reused: 1 for the tokens that the lenient rule kept, 0 for all others; None: there are none.

    Returns:
        Weights in the dtype of `old`, and the masks.
    """
    log_ratio = (old.double() - rollout.double()).detach()
    from_history = torch.zeros_like(old, dtype=torch.bool) if reused is None else reused > 0
    if correction.reused != "correct":
        log_ratio = log_ratio.masked_fill(from_history, 0.0)
    lengths = lengths.to(old.device)
    response = torch.arange(len(lengths), device=old.device).repeat_interleave(lengths, output_size=len(old))
    ratio = safe_exp(_at_level(log_ratio, response, lengths, correction.level))
    vetoed = torch.zeros(len(lengths), dtype=torch.bool, device=old.device)
    if correction.veto is not None:
        vetoed[response[log_ratio < math.log(correction.veto)]] = True
    kept = ~vetoed[response]
    clipped = torch.zeros_like(kept)
    if correction.kind == "tis":
        clipped = kept & (ratio > correction.cap)
        ratio = ratio.clamp(max=correction.cap)
    elif correction.kind == "mask":
        kept &= (ratio >= (correction.floor or 0.0)) & (ratio <= correction.cap)
    else:
        ratio = torch.ones_like(ratio)
    if correction.reused == "mask":
        kept &= ~from_history
        clipped &= kept
    if correction.normalize and kept.any():
        # Each token at level token, each response otherwise, counts once.
        count = torch.ones_like(ratio) if correction.level == "token" else 1.0 / lengths[response].double()
        ratio = ratio * (count[kept].sum() / (ratio * count)[kept].sum())
    weights = torch.where(kept, ratio, 0.0).to(old.dtype)
    return TokenCorrection(weights, kept, clipped, vetoed)


def mismatch_metrics(old: Float[Tensor, "tokens"], rollout: Float[Tensor, "tokens"]) -> dict[str, float]:
    """How far the trainer's log-probs are from the engine's, over all response tokens of a step.

    Args:
        old: the trainer's log-probs before the update.
        rollout: the engine's log-probs.

    Returns:
        `mean_abs` and `max_abs` of `old - rollout` (nats); `kl`, the k3 estimate of KL(rollout || old) (Schulman,
        "Approximating KL divergence", 2020); `ess`, the effective sample size `(sum w)^2 / (n sum w^2)` of the
        untruncated token ratios, in (0, 1] (Kong, 1992). No tokens give no difference: 0, 0, 0, 1.
    """
    if old.numel() == 0:
        return {"mean_abs": 0.0, "max_abs": 0.0, "kl": 0.0, "ess": 1.0}
    # In float64: k3 subtracts nearly equal numbers, and the difference measured here may be 1e-5 or less.
    delta = (old.double() - rollout.double()).detach()
    ratios = safe_exp(delta)
    return {
        "mean_abs": delta.abs().mean().item(),
        "max_abs": delta.abs().max().item(),
        "kl": (ratios - 1 - delta).mean().item(),
        "ess": (ratios.sum() ** 2 / (ratios.numel() * (ratios**2).sum())).item(),
    }


def _at_level(
    log_ratio: Float[Tensor, "tokens"], response: Int[Tensor, "tokens"], lengths: Int[Tensor, "batch"], level: str
) -> Float[Tensor, "tokens"]:
    """The log-ratio that decides about each token: its own, or its response's sum or mean."""
    if level == "token":
        return log_ratio
    total = log_ratio.new_zeros(len(lengths)).index_add(0, response, log_ratio)
    return (total / lengths.clamp(min=1) if level == "geometric" else total)[response]


def _fraction(mask: Bool[Tensor, "any"]) -> float:
    return mask.double().mean().item() if mask.numel() else 0.0
