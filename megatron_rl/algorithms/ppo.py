"""PPO with a critic: generalized advantage estimation, and the critic's loss."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_rl.algorithms.advantages import whiten
from megatron_rl.algorithms.base import CriticAlgorithm


class Ppo(CriticAlgorithm):
    """Advantages by `gae` from rewards of tokens and a critic's values, and the clipped loss.

    Source: Schulman et al., arXiv 1707.06347, as Ziegler et al., arXiv 1909.08593, apply it to language models: one
    episode is a response, and its reward comes with its last token.
    """

    def estimate(
        self, rewards: Float[Tensor, "tokens"], values: Float[Tensor, "tokens"], lengths: Int[Tensor, "batch"]
    ) -> tuple[Float[Tensor, "tokens"], Float[Tensor, "tokens"]]:
        """Generalized advantages, normalized over all tokens with `normalize_std`, and returns."""
        critic = self.settings.critic
        advantages, returns = gae(rewards, values, lengths, critic.gamma, critic.lam)
        return whiten(advantages) if self.settings.normalize_std else advantages, returns


def final_rewards(rewards: Float[Tensor, "batch"], lengths: Int[Tensor, "batch"]) -> Float[Tensor, "tokens"]:
    """Rewards of whole responses as rewards of tokens: each response's at its last token, 0 at all others.

    Args:
        rewards: one per response.
        lengths: response lengths; a response of length 0 has no token to carry its reward.
    """
    tokens = rewards.new_zeros(int(lengths.sum()))
    present = lengths > 0
    tokens[lengths.cumsum(0)[present] - 1] = rewards[present]
    return tokens


def gae(
    rewards: Float[Tensor, "tokens"],
    values: Float[Tensor, "tokens"],
    lengths: Int[Tensor, "batch"],
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "tokens"], Float[Tensor, "tokens"]]:
    """Generalized advantage estimation: `A_t = d_t + gamma lam A_{t+1}`, `d_t = r_t + gamma V_{t+1} - V_t`.

    Source: Schulman et al., arXiv 1506.02438, equations 11 and 16. After the last token of a response the value and the
    advantage are 0; nothing flows from one response to the one before.

    Args:
        rewards: of every token, such as `final_rewards` gives them, response after response.
        values: the critic's, before the update: the expected return from the token on, this token's reward included.
        lengths: response lengths; they sum up to `tokens`.
        gamma: discount, in [0, 1].
        lam: 0 gives the differences `d_t`, 1 the return less the value.

    Returns:
        Advantages, and the returns `A + V` that the critic is trained towards; both without gradient.
    """
    rewards, values = rewards.detach(), values.detach()
    starts = lengths.cumsum(0) - lengths
    longest = int(lengths.max()) if len(lengths) else 0
    advantages = torch.zeros_like(values)
    following = torch.zeros(len(lengths), dtype=values.dtype)  # A_{t+1} of every response
    next_value = torch.zeros_like(following)
    for place in reversed(range(longest)):  # all responses at once: they are zero beyond their ends
        alive = lengths > place
        tokens = starts[alive] + place
        delta = rewards[tokens] + gamma * next_value[alive] - values[tokens]
        following[alive] = delta + gamma * lam * following[alive]
        next_value[alive] = values[tokens]
        advantages[tokens] = following[alive]
    return advantages, advantages + values


def value_loss(
    values: Float[Tensor, "tokens"],
    old_values: Float[Tensor, "tokens"],
    returns: Float[Tensor, "tokens"],
    clip: float | None,
) -> tuple[Float[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
    """`max((V - R)^2, (V_clipped - R)^2) / 2`, where `V_clipped` is within `clip` of the value before the update.

    Source: the code of PPO (arXiv 1707.06347), described in Engstrom et al., "Implementation matters in deep policy
    gradients", arXiv 2005.12729, section 3.

    Args:
        values: the critic's; gradients flow through them.
        old_values: the critic's before the update, without gradients.
        returns: by `gae`, without gradients.
        clip: how far a value may move, > 0; None: no bound.

    Returns:
        The loss of every token, and a mask of the tokens whose gradient the clipping removed.
    """
    plain = (values - returns) ** 2 / 2
    if clip is None:
        return plain, torch.zeros_like(plain, dtype=torch.bool)
    moved = values - old_values
    bounded = (old_values + moved.clamp(-clip, clip) - returns) ** 2 / 2
    # Within the range the two are the same but for rounding, and no gradient is lost.
    return torch.maximum(plain, bounded), (bounded > plain) & (moved.abs() > clip)


def explained_variance(values: Float[Tensor, "tokens"], returns: Float[Tensor, "tokens"]) -> float:
    """`1 - var(returns - values) / var(returns)`: 1 for a critic that knows the returns, 0 for one that knows nothing.

    Returns that are all equal have no variance to explain: 0.
    """
    if returns.numel() == 0 or bool((returns == returns[0]).all()):
        return 0.0
    unexplained, total = ((x.double() - x.double().mean()).square().mean() for x in (returns - values, returns))
    return float(1 - unexplained / total)
