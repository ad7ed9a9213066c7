"""Pass@k training: credit for being in a set of k responses of which at least one is right."""

from math import comb

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_rl.algorithms import PolicyAlgorithm
from megatron_rl.config import ConfigError
from megatron_rl.config.algorithm import AlgorithmConfig


class PassAtK(PolicyAlgorithm):
    """Group-relative advantages of sets of k responses instead of single ones, with the clipped loss of PPO.

    A set's reward is 1 when one of its k responses is right. A response's advantage is the mean of the normalized
    rewards of all sets of its group that it is in, in closed form. Right responses to prompts that are nearly always
    solved get little, rare ones much, so the policy keeps exploring; with k = 1 it is GRPO.

    Source: Chen et al., "Pass@k Training for Adaptively Balancing Exploration and Exploitation of Large Reasoning
    Models", arXiv 2508.10751, equations 14 and 15.

    `algorithm.options`: `k`, from 1 to `algorithm.group_size`.
    """

    def __init__(self, settings: AlgorithmConfig) -> None:
        """Check the options.

        Args:
            settings: the section `algorithm`.

        Raises:
            ConfigError: when `settings.options` is anything but `k` within its bounds.
        """
        super().__init__(settings)
        k = settings.options.get("k")
        if settings.options.keys() != {"k"} or type(k) is not int or not 1 <= k <= settings.group_size:
            raise ConfigError(
                f"algorithm.options={settings.options} must be k alone, a whole number from 1 to algorithm.group_size="
                f"{settings.group_size}."
            )
        self.k = k

    def advantages(
        self, rewards: Float[Tensor, "batch"], groups: Int[Tensor, "batch"], lengths: Int[Tensor, "batch"]
    ) -> Float[Tensor, "tokens"]:
        """The advantage of every response token; a response is right when its reward is positive.

        Args:
            rewards: one per response, penalties included.
            groups: the group (prompt) of every response.
            lengths: response lengths in tokens.

        Returns:
            Response after response, in the dtype of `rewards`. Groups in which every set of k has a right response, or
            none has, give 0.
        """
        right = rewards > 0
        result = torch.zeros_like(rewards)
        for group in groups.unique():
            members = groups == group
            of_right, of_wrong = pass_at_k_advantages(int(members.sum()), int((members & right).sum()), self.k)
            result[members & right] = of_right
            result[members & ~right] = of_wrong
        return result.repeat_interleave(lengths)


def pass_at_k_advantages(responses: int, right: int, k: int) -> tuple[float, float]:
    """The advantages of a right and of a wrong response of a group.

    Args:
        responses: in the group.
        right: so many of them are right.
        k: size of a set, at most `responses`.

    Returns:
        `((1 - m) / s, (1 - m - f) / s)`: m is the share of sets with a right response, s the standard deviation of
        rewards, and f the share of sets without a right response among those that a wrong response is in.
    """
    wrong = responses - right
    mean = 1 - comb(wrong, k) / comb(responses, k)
    if mean in (0.0, 1.0):
        return 0.0, 0.0
    deviation = (mean * (1 - mean)) ** 0.5
    failing = comb(wrong - 1, k - 1) / comb(responses - 1, k - 1)
    return (1 - mean) / deviation, (1 - mean - failing) / deviation
