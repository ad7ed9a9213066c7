"""How `algorithm.name` finds an algorithm, and what it implies."""

import pytest
import torch

from megatron_rl.algorithms import CriticAlgorithm, PolicyAlgorithm, load_algorithm
from megatron_rl.algorithms.registry import BUILTIN
from megatron_rl.config import ConfigError
from megatron_rl.config.algorithm import PRESETS, AlgorithmConfig


class Signs(PolicyAlgorithm):
    """An algorithm of a user: the sign of the reward, times an option."""

    def advantages(self, rewards, groups, lengths):
        return self.settings.options["scale"] * rewards.sign().repeat_interleave(lengths)


class Unfinished(PolicyAlgorithm):
    """Has no advantages."""


class OneStep(CriticAlgorithm):
    """An algorithm of a user that needs a critic: the reward of the token less its value."""

    def estimate(self, rewards, values, lengths):
        return rewards - values, rewards


def test_every_name_has_settings_and_a_class():
    assert BUILTIN.keys() == PRESETS.keys()
    for name, algorithm in BUILTIN.items():
        assert type(load_algorithm(AlgorithmConfig(name=name))) is algorithm


def test_a_name_implies_what_its_paper_sets_and_the_file_wins():
    assert AlgorithmConfig() == AlgorithmConfig(name="grpo", clip_low=0.2, clip_high=0.2, aggregation="token-mean")
    assert AlgorithmConfig().dynamic_sampling == 0
    gspo = AlgorithmConfig(name="gspo", clip_high=0.01)
    assert (gspo.clip_low, gspo.clip_high, gspo.aggregation) == (3e-4, 0.01, "seq-mean-token-mean")
    assert not AlgorithmConfig(name="dr_grpo").normalize_std
    dapo = AlgorithmConfig(name="dapo")
    assert (dapo.clip_low, dapo.clip_high, dapo.aggregation, dapo.dynamic_sampling) == (0.2, 0.28, "token-mean", 9)
    for name in PRESETS:
        settings = AlgorithmConfig(name=name)
        assert AlgorithmConfig.model_validate(settings.model_dump()) == settings, "as saved in run_dir/config.yaml"


def test_those_without_groups_can_do_with_one_response_to_a_prompt():
    for name in ("ppo", "reinforce_pp"):
        assert load_algorithm(AlgorithmConfig(name=name, group_size=1)).settings.group_size == 1


def test_a_class_of_the_user_is_built_with_its_options():
    name = "tests.algorithms.test_registry:Signs"
    algorithm = load_algorithm(AlgorithmConfig(name=name, options={"scale": 3.0}))
    lengths = torch.tensor([2, 0, 1])
    result = algorithm.advantages(torch.tensor([0.5, 1.0, -2.0]), torch.zeros(3, dtype=torch.long), lengths)
    assert result.tolist() == [3.0, 3.0, -3.0]


def test_a_class_of_the_user_may_need_a_critic_and_take_the_kl_off_its_rewards():
    settings = AlgorithmConfig(name="tests.algorithms.test_registry:OneStep", kl={"coef": 0.1, "place": "reward"})
    assert isinstance(load_algorithm(settings), OneStep)


@pytest.mark.parametrize("name", ["grpo", "tests.algorithms.test_registry:Signs"])
def test_a_kl_penalty_in_the_reward_needs_rewards_of_tokens(name):
    with pytest.raises(ConfigError, match="kl.place=reward needs an algorithm with rewards of tokens.*set place to"):
        load_algorithm(AlgorithmConfig(name=name, kl={"coef": 0.1, "place": "reward"}))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tests.no_such_module:Signs", "importing tests.no_such_module failed with ModuleNotFoundError"),
        ("tests.algorithms.test_registry:Nothing", "has no class Nothing derived from megatron_rl.algorithms.Policy"),
        ("tests.algorithms.test_registry:pytest", "has no class pytest derived from"),
        ("tests.algorithms.test_registry:Unfinished", "Unfinished does not define advantages"),
    ],
)
def test_a_class_that_cannot_be_used_is_one_sentence(name, reason):
    with pytest.raises(ConfigError) as caught:
        load_algorithm(AlgorithmConfig(name=name))
    assert str(caught.value).startswith(f"algorithm.name={name}")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"name": "grop"}, "'grop' is not known (did you mean grpo?)"),
        ({"name": "module:"}, "as package.module:Class"),
        ({"name": "rloo", "options": {"a": 1}}, "algorithm.options has a, but algorithm.name=rloo takes no options"),
        ({"name": "gspo", "clip_lo": 1}, "clip_lo"),
        (
            {"name": "rloo", "group_size": 1},
            "group_size=1 leaves nothing to compare a response with, which algorithm.n",
        ),
        ({"name": "ppo", "group_size": 1, "dynamic_sampling": 1}, "which algorithm.dynamic_sampling does; give at"),
        ({"name": "ppo", "group_size": 0}, "group_size"),
    ],
)
def test_a_name_that_cannot_be_is_refused(settings, reason):
    with pytest.raises(ValueError) as caught:
        AlgorithmConfig(**settings)
    assert reason in str(caught.value)
