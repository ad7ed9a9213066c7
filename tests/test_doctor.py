"""The doctor looks at anything and never fails."""

import io

import pytest

from megatron_rl import doctor
from megatron_rl.observability.terminal import Terminal


def test_a_package_that_does_not_load_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda name: "0.28.0" if name == "torchvision" else None)
    monkeypatch.setattr(doctor, "probe", lambda program: (1, "OSError: libcudart.so.13: cannot open"))
    (row,) = doctor.import_breakers()
    assert row.state == "problem"
    assert "libcudart" in row.meaning and "pip uninstall torchvision" in row.meaning


def test_a_missing_package_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda name: None)
    rows = doctor.torch_and_devices() + doctor.trainer_packages() + doctor.engine_packages() + doctor.cpu()
    problems = {row.subject for row in rows if row.state == "problem"}
    assert problems == {"torch", "megatron-core", "transformers", "vLLM", "ray"}


@pytest.mark.parametrize(
    ("installed", "state"),
    [("0.15.3", "problem"), ("0.16.1", "ok"), ("0.16.12", "note"), ("0.17.0", "note"), ("0.20.0", "problem")],
)
def test_an_untested_version_is_a_note_and_an_unsupported_one_a_problem(
    monkeypatch: pytest.MonkeyPatch, installed: str, state: str
) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda name: installed)
    assert doctor.megatron_core().state == state


def test_two_builds_of_vllm_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda name: "0.32.0")
    (row,) = doctor.engine_packages()
    assert row.state == "problem"


def test_a_probe_that_dies_is_reported_not_raised() -> None:
    status, _ = doctor.probe("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert status != 0
    assert doctor.probe("raise OSError('libcudart.so')") == (1, "OSError: libcudart.so")
    assert doctor.probe("print(1 + 1)") == (0, "2")


def test_kernels_that_were_not_built_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = "ImportError: The native library rollout/sampling/_verify.so has not been built: run `make setup`"
    monkeypatch.setattr(doctor, "probe", lambda program: (1, remedy))
    row = doctor.native_kernels()
    assert row.state == "problem" and "make setup" in row.meaning


def test_this_machine_is_examined_with_its_environment() -> None:
    out = io.StringIO()
    findings = doctor.examine(Terminal(file=out, width=160))
    assert {"Python", "torch", "megatron-core", "ray", "native kernels", "CPU cores"} <= {
        finding.subject for finding in findings
    }
    assert "OMP_NUM_THREADS" in out.getvalue()
