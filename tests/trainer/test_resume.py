"""What a run may go on with, and what it says of it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.sections import ScratchModelConfig
from megatron_rl.data.prompts import Prompt
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.scratch import make_scratch_model
from megatron_rl.models.token_ids import load_tokenizer
from megatron_rl.observability.console import Console
from megatron_rl.trainer.resume import RunRecord, check_resumed

PROMPTS = [Prompt("a", [5, 6], "1", "set", "ab"), Prompt("b", [7], "2", "set", "c", "demonstration")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    shapes = {"model": {}, "copy": {}, "wider": {"ffn_hidden_size": 128}}
    for name, shape in shapes.items():
        make_scratch_model(root / name, ScratchModelConfig(**shape))
    return {name: root / name for name in shapes}


def make_record(model: Path, prompts: list[Prompt] = PROMPTS, **sections: Any) -> RunRecord:
    config = Config.model_validate({"model": {"path": str(model)}, "run_dir": "run", **sections})
    return RunRecord.of(config, prompts, load_tokenizer(str(model)), Architecture.from_folder(str(model), None))


def check(then: RunRecord, now: RunRecord, capsys: pytest.CaptureFixture, force: bool = False) -> list[str]:
    """The lines that a run going on from step 3 shows."""
    check_resumed(asdict(then), now, 3, force, Console(enabled=True))
    shown = capsys.readouterr()
    return [line.strip() for line in (shown.out + shown.err).splitlines() if line.strip()]


def test_the_same_experiment_goes_on_without_a_word(models: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    then = make_record(models["model"])
    assert check(then, make_record(models["model"]), capsys) == []


def test_every_changed_key_is_one_line(models: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    then = make_record(models["model"], train={"lr": 1e-4})
    now = make_record(
        models["copy"], train={"lr": 2e-4, "steps": 7}, parallel={"tp_size": 2}, reward={"length_penalty": {"start": 4}}
    )
    lines = check(then, now, capsys)
    assert "train.lr: 0.0001 -> 0.0002" in " ".join(lines)
    assert "train.steps: 100 -> 7" in " ".join(lines)
    assert "parallel.tp_size: 1 -> 2" in " ".join(lines)
    changed = then.changes(now)
    assert f"model.path: {models['model']} -> {models['copy']}" in changed, "a model that has moved is no other model"
    assert any(line.startswith('reward.length_penalty: null -> {"start": 4, ') for line in changed)
    assert len(changed) == 5
    assert not [line for line in changed if line.startswith(("run_dir", "checkpoint.resume"))]


OTHER = [
    (PROMPTS[::-1], "2 then, 2 now"),
    (PROMPTS[:1], "2 then, 1 now"),
    ([PROMPTS[0], Prompt("b", [7], "3", "set", "c", "demonstration")], "2 then, 2 now"),
    ([PROMPTS[0], Prompt("b", [8], "2", "set", "d", "demonstration")], "2 then, 2 now"),
    ([PROMPTS[0], Prompt("b", [7], "2", "set", "c", "another one")], "2 then, 2 now"),
]


@pytest.mark.parametrize(("prompts", "counts"), OTHER, ids=["order", "number", "answer", "text", "demonstration"])
def test_a_data_file_with_other_content_is_refused(
    models: dict[str, Path], capsys: pytest.CaptureFixture, prompts: list[Prompt], counts: str
) -> None:
    with pytest.raises(ConfigError, match=rf"of step 3 .* holds other prompts \({counts}\); set it back"):
        check(make_record(models["model"]), make_record(models["model"], prompts), capsys)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"data": {"seed": 4}}, "data.seed was 0 and is 4"),
        ({"train": {"prompts_per_step": 8}}, "train.prompts_per_step was 32 and is 8"),
    ],
)
def test_another_order_is_refused_unless_forced(
    models: dict[str, Path], capsys: pytest.CaptureFixture, sections: dict, named: str
) -> None:
    then, now = make_record(models["model"]), make_record(models["model"], **sections)
    with pytest.raises(ConfigError, match=f"{named}; set it back, choose another run_dir, or set checkpoint.resume=fo"):
        check(then, now, capsys)
    assert "-> " in " ".join(capsys.readouterr()), "the changes are told before the refusal"
    assert f"checkpoint.resume=force: {named}" in " ".join(check(then, now, capsys, force=True))


def test_a_model_of_another_shape_is_refused(models: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"the shapes or token ids of model.path='.*wider' are others"):
        check(make_record(models["model"]), make_record(models["wider"]), capsys)


def test_a_checkpoint_of_an_older_version_is_not_compared_and_a_line_says_so(
    models: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    check_resumed(None, make_record(models["model"]), 3, False, Console(enabled=True))
    shown = capsys.readouterr()
    assert "nothing is compared" in shown.out + shown.err
