"""The helper that all benchmarks share."""

import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console


@pytest.fixture
def common() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks" / "_common.py"
    spec = importlib.util.spec_from_file_location("benchmarks_common", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_repetitions_are_interleaved_and_warmups_are_not_measured(common: ModuleType) -> None:
    now, calls = 0.0, []
    durations = {"a": iter([99.0, 1.0, 2.0, 30.0]), "b": iter([99.0, 4.0, 4.0, 4.0])}

    def run(name: str) -> None:
        nonlocal now
        calls.append(name)
        now += next(durations[name])

    cases = {"a": lambda: run("a"), "b": lambda: run("b")}
    assert common.measure(cases, repetitions=3, clock=lambda: now) == {"a": 2.0, "b": 4.0}
    assert calls == ["a", "b"] * 4


def test_the_json_has_ratios_rows_and_environment(common: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results" / "x.json"
    arguments = common.parse_arguments(None, ["--quick", "--json", str(file)])
    out = io.StringIO()
    rows = [{"case": "static:eagle:4", "time [ms]": 1.23456}]
    common.finish(arguments, {"a_vs_b": 0.5}, rows, Console(file=out, width=80))
    result = json.loads(file.read_text())
    assert result["ratios"] == {"a_vs_b": 0.5}
    assert result["rows"] == rows
    assert result["quick"] is True
    assert result["environment"]["versions"]["megatron-core"]
    assert result["environment"]["date"].endswith("+00:00")
    assert all(text in out.getvalue() for text in ("1.235", "time [ms]", "static:eagle:4", "a_vs_b"))


def test_without_json_nothing_is_written(common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common.finish(common.parse_arguments(None, []), {"a_vs_b": 0.5}, [], Console(file=io.StringIO()))
    assert list(tmp_path.iterdir()) == []
