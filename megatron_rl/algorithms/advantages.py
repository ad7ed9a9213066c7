"""From rewards to advantages."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def centred_rewards(rewards: Float[Tensor, "batch"], group_ids: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """Rewards less their group's mean.

    Args:
        rewards: one score per response, any float dtype.
        group_ids: the group (prompt) of every response; any integers, in any order.

    Returns:
        Values in the dtype of `rewards`. Groups whose rewards are all equal, and groups of one, give exactly 0.
    """
    group = torch.unique(group_ids, return_inverse=True)[1]
    count = torch.bincount(group).to(rewards.dtype)
    zeros = torch.zeros_like(count)
    mean = zeros.scatter_add(0, group, rewards) / count
    centred = rewards - mean[group]
    low = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    high = zeros.scatter_reduce(0, group, rewards, "amax", include_self=False)
    # The mean of equal floats is not always that float; what rounding leaves must not be blown up by 1 / eps.
    return torch.where((low == high)[group], torch.zeros_like(centred), centred)


def grpo_advantages(
    rewards: Float[Tensor, "batch"],
    group_ids: Int[Tensor, "batch"],
    normalize_std: bool,
    eps: float = 1e-6,
) -> Float[Tensor, "batch"]:
    """Group-relative advantages: `A_i = (r_i - mean) / (std + eps)` over the responses of one group.

    Sources: GRPO, DeepSeekMath, arXiv 2402.03300, equation 3; without the division (`normalize_std=False`), Dr. GRPO,
    arXiv 2503.20783. `std` is the sample standard deviation (divisor n - 1), as `torch.std` and the common
    implementations have it.

    Args:
        rewards: one score per response, any float dtype.
        group_ids: the group (prompt) of every response; any integers, in any order.
        normalize_std: divide by the group's standard deviation.
        eps: added to the standard deviation.

    Returns:
        Advantages in the dtype of `rewards`. Groups whose rewards are all equal, and groups of one, give exactly 0.
    """
    centred = centred_rewards(rewards, group_ids)
    if not normalize_std:
        return centred
    group = torch.unique(group_ids, return_inverse=True)[1]
    count = torch.bincount(group).to(rewards.dtype)
    variance = torch.zeros_like(count).scatter_add(0, group, centred**2) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt()[group] + eps)


def whiten(values: Float[Tensor, "tokens"], eps: float = 1e-8) -> Float[Tensor, "tokens"]:
    """`(v - mean) / sqrt(variance + eps)` over all values, with the variance of the population (divisor n).

    Values that are all equal, and none at all, give exactly 0.
    """
    if values.numel() == 0 or bool((values == values[0]).all()):
        return torch.zeros_like(values)
    centred = values - values.mean()
    return centred / ((centred**2).mean() + eps).sqrt()
