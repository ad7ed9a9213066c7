"""What engine and scheduler exchange: one definition, checked, and readable from earlier runs."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import ConfigError
from rollout.speculation.arms import Arm, Step
from rollout.speculation.bandit import make_controller
from rollout.speculation.speculation_settings import SETTINGS_KEY, LearnedSpeculation, SpeculationSettings
from tests.rollout.helpers import make_config

SETTINGS = SpeculationSettings("thompson", ("ngram", "eagle"), 8, 64, 2**20, seed=3)


def test_settings_survive_the_way_through_vllms_configuration() -> None:
    assert SpeculationSettings.from_vllm(json.loads(json.dumps(SETTINGS.to_vllm()))) == SETTINGS
    assert SpeculationSettings.from_vllm({"another_key": 1}) is None


def test_settings_follow_the_experiment(tmp_path: Path) -> None:
    def settings(**rollout: object) -> SpeculationSettings | None:
        return SpeculationSettings.from_config(make_config(tmp_path, tmp_path, **rollout))

    drafting = {"adaptive": "thompson", "drafters": ["ngram"], "max_draft_tokens": 4}
    history = {"mode": "coupled", "max_draft_tokens": 48}
    assert settings() is None
    drafts, reuses, both = (
        settings(speculation=drafting),
        settings(history=history),
        settings(speculation=drafting, history=history),
    )
    assert drafts is not None and reuses is not None and both is not None
    assert (drafts.drafters, drafts.history_tokens, drafts.longest_draft) == (("ngram",), 0, 4)
    assert (reuses.drafters, reuses.history_tokens, reuses.longest_draft) == ((), 48, 48)
    assert (both.drafters, both.history_tokens, both.longest_draft) == (("ngram",), 48, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptive": "beg"}, r"adaptive='beg' is not one of off, static, epsilon_greedy, thompson"),
        ({"drafters": ["medusa"]}, r"drafters=\['medusa'\] may name ngram and eagle only"),
        ({"max_bytes": -1}, r"max_bytes=-1 must be a whole number, 0 or more"),
        ({"max_draft_tokens": 2.5}, r"max_draft_tokens=2.5 must be a whole number, 0 or more"),
        ({"memory": 1}, r"has a missing or unknown key: memory"),
        ({"seed": None}, r"has a missing or unknown key: seed"),
    ],
)
def test_settings_with_wrong_keys_or_values_are_refused(change: dict[str, Any], message: str) -> None:
    values = SETTINGS.to_vllm()[SETTINGS_KEY] | change
    values = {name: value for name, value in values.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        SpeculationSettings.from_vllm({SETTINGS_KEY: values})


@pytest.mark.parametrize(
    ("old_name", "rule"), [("model", "thompson"), ("beg", "epsilon_greedy"), ("thompson", "thompson")]
)
def test_what_a_run_learned_before_the_rules_were_renamed_is_restored(old_name: str, rule: str) -> None:
    trained, draw = make_controller(rule, ["ngram"], 4), random.Random(5)
    for number in range(40):
        k = (0, 1, 2, 4)[number % 4]
        arm = Arm("ngram", k) if k else Arm("none", 0)
        trained.observe(Step(arm, 8, 8 * k, 8 + 4 * k, 0.01 + 0.001 * draw.random()))
    stored = json.loads(json.dumps({"adaptive": old_name, "learned": trained.state()}))
    learned = LearnedSpeculation.from_dict(stored)
    assert learned.adaptive == rule
    fresh = make_controller(rule, ["ngram"], 4)
    assert fresh.state() != trained.state()
    fresh.restore(learned.learned)
    assert json.dumps(fresh.state()) == json.dumps(trained.state())
    assert LearnedSpeculation.from_dict(learned.to_dict()) == learned
