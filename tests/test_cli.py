"""The command line: quick answers, and a user's mistake told in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.cli import main

CONFIGS = Path(__file__).parent.parent / "configs"
DEMO = str(CONFIGS / "arithmetic.yaml")


def megatron_rl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_rl.cli", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def assert_one_line_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def test_a_mistyped_key_is_one_line_with_a_suggestion() -> None:
    result = megatron_rl("train", "-c", DEMO, "rollout.temprature=1")
    assert_one_line_error(result, "rollout.temprature", "rollout.temperature")


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_missing_file_is_one_line(command: str, tmp_path: Path) -> None:
    result = megatron_rl(command, "-c", str(tmp_path / "none.yaml"))
    assert_one_line_error(result, "none.yaml", "does not exist")


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    result = megatron_rl("train", "-c", DEMO, f"model.path={tmp_path / 'none'}")
    assert_one_line_error(result, "model.path", "none")


def test_an_impossible_layout_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    sft = str(CONFIGS / "arithmetic-sft.yaml")
    result = megatron_rl("sft", "-c", sft, f"model.path={tmp_path / 'new'}", "parallel.tp_size=4")
    assert_one_line_error(result, "parallel.tp_size=4", "num_attention_heads=6")
    assert not (tmp_path / "new").exists()


def test_convert_does_not_write_into_a_folder_with_files(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    result = megatron_rl("convert", "--to", "hf", str(tmp_path), str(tmp_path))
    assert_one_line_error(result, "not an empty folder")


def test_an_evaluation_of_a_folder_without_weights_is_one_line(tmp_path: Path) -> None:
    result = megatron_rl("eval", "-c", DEMO, "--checkpoint", str(tmp_path))
    assert_one_line_error(result, "--checkpoint", "neither *.safetensors nor megatron/metadata.json", "run_dir/best")


def test_an_unknown_training_set_is_one_line(tmp_path: Path) -> None:
    result = megatron_rl("data", "prepare", "gsm9k", "--output", str(tmp_path / "train.parquet"))
    assert_one_line_error(result, "'gsm9k'", "deepmath", "NAME=FILE")


def test_a_file_that_is_no_profile_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    result = megatron_rl("quantize", "setup", str(tmp_path / "empty"), "--output", str(tmp_path / "int8.yaml"))
    assert_one_line_error(result, "empty is no profile", "quantize profile")
    assert not (tmp_path / "int8.yaml").exists()


def test_help_and_config_errors_do_not_import_torch() -> None:
    program = (
        "import sys\n"
        "from megatron_rl.cli import main\n"
        f"for arguments in (['--help'], ['train', '--help'], ['train', '-c', {DEMO!r}, 'no.such=1']):\n"
        "    sys.argv = ['megatron-rl', *arguments]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit:\n"
        "        pass\n"
        "print('heavy:', [name for name in ('torch', 'vllm', 'ray', 'matplotlib') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "heavy: []"


def test_config_prints_the_resolved_experiment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    import yaml

    monkeypatch.setattr(sys, "argv", ["megatron-rl", "config", "-c", DEMO, "train.lr=5e-4"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["train"]["lr"] == 5e-4
    assert shown["algorithm"]["correction"]["kind"] == "tis"  # from base.yaml
    assert shown["algorithm"]["aggregation"] == "token-mean"  # what grpo implies
    assert shown["train"]["adam_beta1"] == 0.9  # a default


def test_config_explains_a_key_and_suggests_another_for_a_mistyped_one() -> None:
    result = megatron_rl("config", "--explain", "rollout.temperature")
    assert "rollout.temperature: float" in result.stdout and "Sampling temperature" in result.stdout
    assert_one_line_error(megatron_rl("config", "--explain", "rollout.temprature"), "rollout.temperature")


def test_config_wants_one_of_its_two_uses() -> None:
    assert_one_line_error(megatron_rl("config"), "--explain", "-c FILE")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*-*.yaml")) + [Path(DEMO)], ids=lambda file: file.name)
def test_every_shipped_experiment_is_valid(file: Path) -> None:
    from megatron_rl.config import load_config

    assert load_config(file).run_dir
