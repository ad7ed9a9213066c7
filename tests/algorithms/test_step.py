"""What the updates of a step learn from."""

import pytest
import torch

from megatron_rl.algorithms import load_algorithm, step_advantages
from megatron_rl.config.algorithm import AlgorithmConfig

REWARDS = torch.tensor([1.0, -2.0], dtype=torch.float64)
GROUPS = torch.tensor([0, 0])
LENGTHS = torch.tensor([3, 1])


def _tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_without_a_critic_there_are_advantages_alone():
    algorithm = load_algorithm(AlgorithmConfig(name="dr_grpo"))
    found = step_advantages(algorithm, REWARDS, GROUPS, LENGTHS, {})
    assert {name: values.tolist() for name, values in found.items()} == {"advantages": [1.5, 1.5, 1.5, -1.5]}


@pytest.mark.parametrize("kl", [{"coef": 0.5}, {"coef": 0.0, "place": "reward"}])
def test_a_penalty_elsewhere_leaves_the_reward_alone(kl):
    algorithm = load_algorithm(AlgorithmConfig(name="ppo", normalize_std=False, kl=kl))
    known = {"values": _tensor(0, 0, 0, 0), "old_logprobs": _tensor(0, 0, 0, 0), "ref_logprobs": _tensor(1, 1, 1, 1)}
    assert step_advantages(algorithm, REWARDS, GROUPS, LENGTHS, known)["returns"].tolist() == [1, 1, 1, -2]


def test_the_penalty_is_taken_off_every_token():
    # k1 of the tokens: old - ref = 0.2, -0.4, 0, 1; times 0.5 off the rewards 0 0 1 | -2 gives -0.1 0.2 1 | -2.5.
    # gamma 0.9, lambda 0.5, values 0.5 0.4 0.2 | 0.3:
    #   d_2 = 1 - 0.2 = 0.8                     A_2 = 0.8
    #   d_1 = 0.2 + 0.18 - 0.4 = -0.02          A_1 = -0.02 + 0.45 * 0.8 = 0.34
    #   d_0 = -0.1 + 0.36 - 0.5 = -0.24         A_0 = -0.24 + 0.45 * 0.34 = -0.087
    settings = {"critic": {"gamma": 0.9, "lam": 0.5}, "normalize_std": False}
    kl = {"coef": 0.5, "place": "reward", "estimator": "k1"}
    known = {
        "values": _tensor(0.5, 0.4, 0.2, 0.3),
        "old_logprobs": _tensor(-1, -1, -1, -1),
        "ref_logprobs": _tensor(-1.2, -0.6, -1, -2),
    }
    algorithm = load_algorithm(AlgorithmConfig(name="ppo", kl=kl, **settings))
    found = step_advantages(algorithm, REWARDS, GROUPS, LENGTHS, known)
    assert found["advantages"].tolist() == pytest.approx([-0.087, 0.34, 0.8, -2.8])
    assert found["returns"].tolist() == pytest.approx([0.413, 0.74, 1.0, -2.5])
