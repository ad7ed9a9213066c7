"""From a step's rewards to what its updates learn from, with or without a critic."""

from collections.abc import Mapping

from jaxtyping import Float, Int
from torch import Tensor

from megatron_rl.algorithms.base import CriticAlgorithm, PolicyAlgorithm
from megatron_rl.algorithms.loss import kl_estimate
from megatron_rl.algorithms.ppo import final_rewards
from megatron_rl.config.algorithm import KlConfig


def step_advantages(
    algorithm: PolicyAlgorithm | CriticAlgorithm,
    rewards: Float[Tensor, "batch"],
    groups: Int[Tensor, "batch"],
    lengths: Int[Tensor, "batch"],
    known: Mapping[str, Float[Tensor, "tokens"]],
) -> dict[str, Float[Tensor, "tokens"]]:
    """`advantages`, and with a critic also the `returns` that it is trained towards.

    Args:
        algorithm: whose rule it is.
        rewards: one per response, penalties included.
        groups: the group (prompt) of every response.
        lengths: response lengths; they sum up to `tokens`.
        known: per-token values by the names of `Batch.values`. A critic needs `values`, a penalty in the reward also
            `old_logprobs` and `ref_logprobs`.
    """
    if isinstance(algorithm, PolicyAlgorithm):
        return {"advantages": algorithm.advantages(rewards, groups, lengths)}
    token_rewards = final_rewards(rewards, lengths)
    kl = algorithm.settings.kl
    if kl.coef > 0 and kl.place == "reward":
        token_rewards = token_rewards - kl.coef * reward_kl(known, kl)
    advantages, returns = algorithm.estimate(token_rewards, known["values"], lengths)
    return {"advantages": advantages, "returns": returns}


def reward_kl(known: Mapping[str, Float[Tensor, "tokens"]], kl: KlConfig) -> Float[Tensor, "tokens"]:
    """Of every token the estimated divergence from the reference that `algorithm.kl.place=reward` takes off.

    Source: Ziegler et al., arXiv 1909.08593, equation 2, with `k1`.

    Args:
        known: `old_logprobs` and `ref_logprobs`.
        kl: the estimator.
    """
    return kl_estimate(known["old_logprobs"], known["ref_logprobs"], kl.estimator)
