"""REINFORCE++: advantages are normalized over the whole batch instead of the group."""

from jaxtyping import Float, Int
from torch import Tensor

from megatron_rl.algorithms.advantages import centred_rewards, whiten
from megatron_rl.algorithms.base import PolicyAlgorithm


class ReinforcePP(PolicyAlgorithm):
    """`A = (r - mean) / std` over all response tokens of the step, with the clipped loss of PPO.

    Source: Hu et al., "REINFORCE++", arXiv 2501.03262. The reward is that of the whole response (no discount); the KL
    penalty is `algorithm.kl`, in the loss and not in the reward.
    """

    def advantages(
        self, rewards: Float[Tensor, "batch"], groups: Int[Tensor, "batch"], lengths: Int[Tensor, "batch"]
    ) -> Float[Tensor, "tokens"]:
        """The response's reward for each of its tokens, normalized over all tokens."""
        return whiten(rewards.repeat_interleave(lengths))


class ReinforcePPBaseline(PolicyAlgorithm):
    """The same with the group's mean subtracted first: REINFORCE++-baseline, arXiv 2501.03262.

    The mean over tokens is not the mean over responses, so groups whose rewards are all equal can get an advantage.
    """

    def advantages(
        self, rewards: Float[Tensor, "batch"], groups: Int[Tensor, "batch"], lengths: Int[Tensor, "batch"]
    ) -> Float[Tensor, "tokens"]:
        """The response's reward less its group's mean for each of its tokens, normalized over all tokens."""
        return whiten(centred_rewards(rewards, groups).repeat_interleave(lengths))
