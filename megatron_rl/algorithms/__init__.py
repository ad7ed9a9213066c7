"""The mathematics of the policy update: pure functions on packed tensors, without torch.distributed.

Each family of algorithms has a file with what is its own, the advantages or the loss of a token (`base`); `registry`
finds them by `algorithm.name`.

Packed layout: per-token tensors are flat `[tokens]`, the response tokens of all sequences of a batch one after the
other; `lengths [batch]` are the response lengths.
"""

from megatron_rl.algorithms.advantages import centred_rewards, grpo_advantages, whiten
from megatron_rl.algorithms.base import CriticAlgorithm, PolicyAlgorithm, PolicyLoss, PolicyTokens, policy_objective
from megatron_rl.algorithms.correction import TokenCorrection, correct_mismatch, mismatch_metrics
from megatron_rl.algorithms.loss import bounded_exp, clipped_loss, kl_estimate, ppo_loss, safe_exp, token_weights
from megatron_rl.algorithms.registry import load_algorithm, needs_critic
from megatron_rl.algorithms.step import step_advantages

__all__ = [
    "CriticAlgorithm",
    "PolicyAlgorithm",
    "PolicyLoss",
    "PolicyTokens",
    "TokenCorrection",
    "bounded_exp",
    "centred_rewards",
    "clipped_loss",
    "correct_mismatch",
    "grpo_advantages",
    "kl_estimate",
    "load_algorithm",
    "mismatch_metrics",
    "needs_critic",
    "policy_objective",
    "ppo_loss",
    "safe_exp",
    "step_advantages",
    "token_weights",
    "whiten",
]
