"""The mathematics of the policy update: pure functions on packed tensors, without torch.distributed.

Packed layout: per-token tensors are flat `[tokens]`, the response tokens of all sequences of a batch one after the
other; `lengths [batch]` are the response lengths.
"""

from megatron_rl.algorithms.advantages import grpo_advantages
from megatron_rl.algorithms.aggregation import token_weights
from megatron_rl.algorithms.correction import TokenCorrection, correct_mismatch, mismatch_metrics
from megatron_rl.algorithms.kl import kl_estimate
from megatron_rl.algorithms.loss import ppo_loss
from megatron_rl.algorithms.objective import PolicyTokens, policy_objective

__all__ = [
    "PolicyTokens",
    "TokenCorrection",
    "correct_mismatch",
    "grpo_advantages",
    "kl_estimate",
    "mismatch_metrics",
    "policy_objective",
    "ppo_loss",
    "token_weights",
]
