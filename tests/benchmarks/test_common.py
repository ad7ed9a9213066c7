"""The helper that all benchmarks share."""

import importlib.util
import io
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_rl.observability.terminal import standard_output
from tests.launching import ROOT

BENCHMARKS = sorted((ROOT / "benchmarks").glob("bench_*.py"))


@pytest.fixture
def common() -> ModuleType:
    file = ROOT / "benchmarks" / "_common.py"
    spec = importlib.util.spec_from_file_location("benchmarks_common", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
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
    common.finish(arguments, {"a_vs_b": 0.5}, rows, standard_output(out))
    result = json.loads(file.read_text())
    assert result["ratios"] == {"a_vs_b": 0.5}
    assert result["rows"] == rows
    assert result["quick"] is True
    assert result["environment"]["versions"]["megatron-core"]
    assert result["environment"]["date"].endswith("+00:00")
    assert all(text in out.getvalue() for text in ("1.235", "time [ms]", "static:eagle:4", "a_vs_b"))


def test_without_json_nothing_is_written(common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common.finish(common.parse_arguments(None, []), {"a_vs_b": 0.5}, [], standard_output(io.StringIO()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_every_benchmark_explains_itself_and_has_the_common_flags(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(file.parent))  # as for `python benchmarks/bench_x.py`
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(file), run_name="__main__")
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert f"usage: {file.name}" in text and "--quick" in text and "--json FILE" in text
    assert f"\n    python benchmarks/{file.name} [--quick] [--json FILE]" in text


def test_the_page_of_benchmarks_names_them_all_and_no_others() -> None:
    named = set(re.findall(r"bench_\w+", (ROOT / "docs" / "benchmarks.md").read_text()))
    assert BENCHMARKS and named == {file.stem for file in BENCHMARKS}
