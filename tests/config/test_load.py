import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.config import Config, ConfigError, load_config, save_config

MINIMAL = "model: {path: models/base}\nrun_dir: runs/test\n"


@pytest.fixture
def load(tmp_path):
    def load(text=MINIMAL, *overrides, name="experiment.yaml"):
        (tmp_path / name).write_text(text)
        return load_config(tmp_path / name, overrides)

    return load


def _error(load, *arguments):
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_defaults_fill_what_the_file_leaves_out(load):
    config = load()
    assert config.algorithm.group_size == 8
    assert config.rollout.temperature == 1.0


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("rollout.temprature=1", "unknown key rollout.temprature (did you mean rollout.temperature?)."),
        ("temperature=1", "unknown key temperature (did you mean rollout.temperature?)."),
        ("algoritm.group_size=4", "unknown key algoritm (did you mean algorithm?)."),
        ("track.wandb.mod=online", "unknown key track.wandb.mod (did you mean track.wandb.mode?)."),
        ("checkpoint.frequency=1", "unknown key checkpoint.frequency; checkpoint has every, keep, resume, export_hf."),
        ("zzz=1", "unknown key zzz; the top level has model, parallel, data"),
    ],
)
def test_an_unknown_key_is_named_with_a_suggestion(load, override, suggestion):
    assert suggestion in _error(load, MINIMAL, override)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.lr=abc", ["train.lr='abc'", "number"]),
        ("train.lr=-1", ["train.lr=-1", "greater than 0"]),
        ("train.lr=inf", ["train.lr"]),
        ("train.lr=null", ["train.lr=None", "number"]),
        ("train.steps=2.5", ["train.steps=2.5", "integer"]),
        ("train.steps='5'", ["train.steps='5'", "integer"]),
        ("rollout.max_tokens=true", ["rollout.max_tokens=True", "integer"]),
        ("track.report=1", ["track.report=1", "boolean"]),
        ("run_dir=5", ["run_dir=5", "string"]),
        ("data.eval=one", ["data.eval='one'", "list"]),
        ("algorithm.kl.estimator=k4", ["algorithm.kl.estimator='k4'", "'k1', 'k2' or 'k3'"]),
        ("algorithm.clip_low=1.5", ["algorithm.clip_low=1.5", "less than or equal to 1"]),
        ("train=3", ["train=3", "section"]),
        ("reward.length_penalty.coef=1", ["reward.length_penalty.start", "required"]),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_expected(load, override, parts):
    message = _error(load, MINIMAL, override)
    for part in parts:
        assert part in message


def test_several_wrong_values_are_counted(load):
    assert "(and 1 more)" in _error(load, MINIMAL, "train.lr=-1", "train.steps=0")


def test_required_keys_are_required(load):
    assert "the key model is required" in _error(load, "run_dir: r\n")
    assert "the key run_dir is required" in _error(load, "model: {path: a}\n")


@pytest.mark.parametrize("override", ["train.lr", "=1", "a..b=1", ".a=1", "train .lr=1"])
def test_an_override_that_is_no_assignment_is_refused(load, override):
    assert "must have the form key.path=value" in _error(load, MINIMAL, override)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("- a\n", "key: value"), ("a: [", "not valid YAML"), ("a: 1\na: 2\n", "duplicate"), ("run_dir: ${x}", "'x' not")],
)
def test_a_broken_file_is_one_sentence(load, text, reason):
    assert reason in _error(load, text)


def test_missing_files_and_folders_are_one_sentence(load, tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    assert "(the base of" in _error(load, "base: none.yaml\n")


def test_overrides_are_yaml_and_win_over_the_file(load):
    config = load(
        MINIMAL + "train: {lr: 1.0}\n", "train.lr=3e-5", "data.eval=[a, b]", "rollout.vllm={enforce_eager: true}"
    )
    assert config.train.lr == 3e-5
    assert config.data.eval == ["a", "b"]
    assert config.rollout.vllm == {"enforce_eager": True}


def test_a_child_changes_keys_of_its_base_and_keeps_the_others(load, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "root.yaml").write_text("train: {lr: 1.0e-3, steps: 7}\nalgorithm: {kl: {coef: 0.1}}\n")
    (tmp_path / "shared" / "base.yaml").write_text("base: root.yaml\ntrain: {steps: 8}\n")
    config = load("base: shared/base.yaml\nalgorithm: {kl: {estimator: k1}}\n" + MINIMAL)
    assert (config.train.lr, config.train.steps) == (1e-3, 8)
    assert (config.algorithm.kl.coef, config.algorithm.kl.estimator) == (0.1, "k1")


@pytest.mark.parametrize("files", [{"a.yaml": "a.yaml"}, {"a.yaml": "b.yaml", "b.yaml": "./a.yaml"}])
def test_a_loop_of_bases_is_refused(tmp_path, files):
    for name, base in files.items():
        (tmp_path / name).write_text(f"base: {base}\n")
    with pytest.raises(ConfigError, match="leads back to itself"):
        load_config(tmp_path / "a.yaml")


def test_interpolation_is_resolved(load):
    assert load(MINIMAL + "data: {seed: '${train.seed}'}\ntrain: {seed: 5}\n").data.seed == 5


def test_a_saved_config_loads_to_the_same_config(load, tmp_path):
    config = load(
        MINIMAL,
        "train.lr=3e-7",
        "reward.length_penalty.start=9",
        "model.megatron.attention_softmax_in_fp32=true",
        "model.scratch={}",
        "parallel.dp_size=2",
    )
    saved = tmp_path / "deep" / "config.yaml"
    save_config(config, saved)
    assert load_config(saved) == config
    assert [file.name for file in saved.parent.iterdir()] == ["config.yaml"]


def test_configs_are_immutable(load):
    with pytest.raises(ValueError, match="frozen"):
        load().train.lr = 1.0


def test_every_shipped_experiment_is_valid():
    folder = Path(__file__).parents[2] / "configs"
    experiments = [file for file in folder.glob("*.yaml") if file.name != "base.yaml"]
    assert experiments
    for file in experiments:
        assert isinstance(load_config(file), Config)


def test_the_config_package_does_not_import_torch():
    code = (
        "import sys, megatron_rl.config, megatron_rl.config.model_fit, megatron_rl.config.explain\n"
        "sys.exit(bool({'torch', 'vllm', 'ray', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_bare_off_is_understood(tmp_path: Path) -> None:
    """YAML 1.1 reads `off` as false."""
    file = tmp_path / "x.yaml"
    file.write_text("model: {path: m}\nrun_dir: r\nrollout: {speculation: {adaptive: off}}\n")
    assert load_config(file, []).rollout.speculation.adaptive == "off"
    assert (
        load_config(file, ["rollout.speculation.adaptive=epsilon_greedy"]).rollout.speculation.adaptive
        == "epsilon_greedy"
    )
    with pytest.raises(ConfigError, match=r"rollout\.speculation\.adaptive"):
        load_config(file, ["rollout.speculation.adaptive=best"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rollout.verify=coupled", "rollout.sampler"),
        ("rollout.partial_share=0.5", "rollout.partial_fraction"),
        ("train.minibatches=2", "train.num_minibatches"),
        ("data.arithmetic.direct_share=0.5", "data.arithmetic.direct_fraction"),
        ("rollout.speculation.adaptive=beg", "epsilon_greedy"),
        ("rollout.speculation.adaptive=model", "thompson"),
    ],
)
def test_an_old_name_is_answered_with_the_new_one(tmp_path: Path, old: str, new: str) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text("model: {path: m}\nrun_dir: r\n")
    with pytest.raises(ConfigError, match=f"called {re.escape(new)} now"):
        load_config(file, [old])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train: {seed: !!timestamp 2024-99-99}", "is not valid YAML: month must be in 1..12."),
        (f"train: {{seed: {'9' * 5000}}}", "is not valid YAML: Exceeds the limit (4300 digits)"),
        ("rollout: {vllm: " + "[" * 3000 + "]" * 3000 + "}", "is not valid YAML: "),
        ('base: "a\\0b"', "cannot be read (embedded null byte)."),
        ("base: ${train.lr}", "`base:` must be the name of a file: "),
        ("rollout: {vllm: {x: !!binary aGk=}}", "rollout.vllm.x holds a value of type bytes"),
        ("rollout: {vllm: {1: x}}", "rollout.vllm has the key 1"),
        ('"\\x85": 1', "unknown key \\x85"),
    ],
    ids=range(8),
)
def test_whatever_yaml_can_write_is_a_config_or_one_line(load, text, part):
    message = _error(load, MINIMAL + text + "\n")
    assert part in message and message.isprintable()


def test_an_override_with_control_characters_or_endless_digits_is_one_line(load):
    for override in ("train.seed=" + "9" * 5000, "model=\f", "train.lr=\x85", "data.train=\ud800\x00"):
        assert _error(load, MINIMAL, override).isprintable()
