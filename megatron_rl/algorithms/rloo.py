"""RLOO: the other responses to the same prompt are the baseline."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_rl.algorithms.advantages import centred_rewards
from megatron_rl.algorithms.base import PolicyAlgorithm


class Rloo(PolicyAlgorithm):
    """`A_i = r_i - mean of r_j, j != i`, with the clipped loss of PPO.

    Sources: Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!" (2019); Ahmadian et al., arXiv 2402.14740,
    section 2.3. Theirs is plain REINFORCE, which the clipped loss is as long as there is one update per step.
    """

    def advantages(
        self, rewards: Float[Tensor, "batch"], groups: Int[Tensor, "batch"], lengths: Int[Tensor, "batch"]
    ) -> Float[Tensor, "tokens"]:
        """`n / (n - 1) (r_i - mean)`, which is the same; exactly 0 for equal rewards and groups of one."""
        _, group, counts = torch.unique(groups, return_inverse=True, return_counts=True)
        size = counts[group].to(rewards.dtype)
        advantages: Tensor = centred_rewards(rewards, groups) * size / (size - 1).clamp(min=1)
        return advantages.repeat_interleave(lengths)
