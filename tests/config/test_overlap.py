"""`rollout.async_steps` and `rollout.partial` beside other keys."""

import logging

import pytest
from pydantic import ValidationError

from megatron_rl.config import Config
from megatron_rl.generation.precision_metrics import warn_of_bias

ASYNC, PARTIAL = {"async_steps": 1}, {"partial": True}


def make(rollout: dict, **sections: dict) -> Config:
    return Config.model_validate({"model": {"path": "m"}, "rollout": rollout, "run_dir": "r", **sections})


@pytest.mark.parametrize("setting", [ASYNC, PARTIAL])
@pytest.mark.parametrize(
    ("rollout", "sections", "named"),
    [
        ({}, {"algorithm": {"name": "dapo"}}, "algorithm.dynamic_sampling"),
        ({"history": {"mode": "coupled"}}, {}, "rollout.history.mode"),
        ({"history": {"mode": "lenient"}}, {}, "rollout.history.mode"),
        ({"quantization": ["int8", "none"], "engines": 2}, {}, "rollout.quantization"),
        ({"quantization": ["int8", "none"], "engines": 2, "precision_tail": 0.1}, {}, "rollout.quantization"),
        ({"sampler": "rejection"}, {}, "rollout.sampler"),
        ({"sampling": {"presence_penalty": 0.1}}, {}, "rollout.sampling.presence_penalty"),
        (
            {"speculation": {"drafters": ["eagle"], "adaptive": "thompson"}},
            {"drafter": {"fill": ["tails"]}},
            "drafter.fill",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(setting: dict, rollout: dict, sections: dict, named: str) -> None:
    make(rollout, **sections)
    with pytest.raises(ValidationError, match=named.replace(".", r"\.")) as refusal:
        make(rollout | setting, **sections)
    assert next(iter(setting)) in str(refusal.value)


def test_engines_do_not_sleep_while_they_generate() -> None:
    make(PARTIAL | {"sleep": 1})
    with pytest.raises(ValidationError, match=r"rollout\.sleep=1"):
        make(ASYNC | {"sleep": 1})


def test_both_go_with_drafts_quantization_and_each_other() -> None:
    make(ASYNC | PARTIAL | {"quantization": "int8", "speculation": {"adaptive": "thompson"}})


@pytest.mark.parametrize(
    ("rollout", "kind", "lines"), [(ASYNC, "none", 1), (PARTIAL, "none", 1), (ASYNC, "tis", 0), (ASYNC, "mask", 0)]
)
def test_old_tokens_without_a_correction_are_warned_of(
    rollout: dict, kind: str, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_bias(make(rollout, algorithm={"correction": {"kind": kind}}))
    assert len(caplog.records) == lines
    assert all(f"rollout.{next(iter(rollout))}=" in record.getMessage() for record in caplog.records)
