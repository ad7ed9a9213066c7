"""Whatever an experiment file or an override says: a config that is what it says, or one sentence."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_rl.config import ConfigError, load_config, save_config
from megatron_rl.config.load import all_keys
from tests.fuzz.reading import assert_sentence
from tests.fuzz.strategies import JSON_VALUES, TEXT

KEYS = st.sampled_from(all_keys())
VALUES = st.one_of(
    st.sampled_from(
        ["1", "0", "-1", "1.5", "1e-6", "true", "null", "~", "auto", "math", "[]", "{}", "[1, 2]", "{a: 1}", "", "a b"]
        + [
            "${train.lr}",
            "${",
            "${no.key}",
            "${oc.env:NO_SUCH}",
            "2024-99-99",
            "0x",
            "&a [*a]",
            "!!python/name:os.system",
        ]
        + [
            "!!binary x",
            "1_0",
            "0b2",
            "1:60",
            ".nan",
            "-.inf",
            "'",
            '"\\ud800"',
            "[" * 3000,
            "9" * 5000,
            "? a",
            "*b",
            "\x00",
        ]
    ),
    st.integers().map(str),
    st.floats().map(str),
    TEXT,
    JSON_VALUES.map(lambda value: yaml.safe_dump(value, default_flow_style=True)),
)
OVERRIDES = st.builds("{}={}".format, KEYS | TEXT, VALUES)
BASE = "model: {path: none}\nrun_dir: runs/fuzz\n"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def load(file: Path, overrides: list[str]) -> None:
    try:
        config = load_config(file, overrides)
    except ConfigError as error:
        assert_sentence(str(error))
        assert str(error).strip()
        return
    save_config(config, file.parent / "saved.yaml")
    assert load_config(file.parent / "saved.yaml") == config


@given(overrides=st.lists(OVERRIDES, min_size=1, max_size=3))
def test_overrides_are_a_config_or_one_sentence(folder: Path, overrides: list[str]) -> None:
    (folder / "experiment.yaml").write_text(BASE)
    load(folder / "experiment.yaml", overrides)


LINES = st.one_of(
    st.builds(
        "{}: {}".format, st.sampled_from(["model", "data", "train", "base", "run_dir", "rollout"]) | TEXT, VALUES
    ),
    st.builds(
        "{}:\n  {}: {}".format, st.sampled_from(["data", "train", "reward"]), st.sampled_from(["seed", "lr"]), VALUES
    ),
    TEXT,
)


@given(lines=st.lists(LINES, max_size=3), raw=st.none() | st.binary(max_size=20))
@example(lines=["base: experiment.yaml"], raw=None)
def test_an_experiment_file_is_a_config_or_one_sentence(folder: Path, lines: list[str], raw: bytes | None) -> None:
    text = "\n".join([BASE.rstrip(), *lines]).encode("utf-8", "surrogatepass")
    (folder / "experiment.yaml").write_bytes(text if raw is None else text + b"\n" + raw)
    load(folder / "experiment.yaml", [])
