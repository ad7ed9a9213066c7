"""GRPO and those that differ from it in settings alone: Dr. GRPO and DAPO."""

from jaxtyping import Float, Int
from torch import Tensor

from megatron_rl.algorithms.advantages import grpo_advantages
from megatron_rl.algorithms.base import PolicyAlgorithm


class Grpo(PolicyAlgorithm):
    """Rewards relative to the group, and the clipped loss of PPO.

    - grpo: DeepSeekMath, arXiv 2402.03300, equations 3 and 4;
    - dr_grpo: without the division by the standard deviation, and with one constant instead of the response's length,
      arXiv 2503.20783, section 3.2;
    - dapo: a wider upper clip range, the mean over tokens, and no groups without a difference, arXiv 2503.14476,
      equations 10 to 12. Its penalty for overlong responses is `reward.length_penalty`.
    """

    def advantages(
        self, rewards: Float[Tensor, "batch"], groups: Int[Tensor, "batch"], lengths: Int[Tensor, "batch"]
    ) -> Float[Tensor, "tokens"]:
        """The response's group-relative reward, for each of its tokens."""
        return grpo_advantages(rewards, groups, self.settings.normalize_std).repeat_interleave(lengths)
