"""What setup.py asks for fits together: with the CPU lock, and on GPUs for every Python that it admits."""

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_rl import doctor
from megatron_rl.megatron_patches import versions
from tests.launching import ROOT

PYTHONS = ("3.11", "3.12", "3.13")
# Transformer Engine's torch part is a source package whose build needs torch and CUDA even to tell what it requires;
# this is what its PKG-INFO tells (2.20.2). Everything else is resolved by what the index says.
SOURCE_PACKAGES = """
[[dependency-metadata]]
name = "transformer-engine-torch"
requires-dist = [
    "torch>=2.1", "einops", "onnxscript", "onnx", "packaging", "pydantic", "nvdlfw-inspect",
    "nvidia-cudnn-frontend>=1.29.0", "transformer-engine-cu13",
]
"""


def pins(text: str) -> dict[str, str]:
    """Versions by name in a list of `name==version`."""
    lines = (line.partition(" ")[0] for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {name.lower(): version for name, version in (line.split("==") for line in lines)}


def required(extra: str, python: str = "3.11") -> dict[str, SpecifierSet]:
    """What the installed package asks for, by name."""
    environment = {"extra": extra, "python_version": python, "platform_system": "Linux"}
    found = [Requirement(line) for line in requires("megatron-rl") or []]
    return {each.name: each.specifier for each in found if each.marker is None or each.marker.evaluate(environment)}


@pytest.mark.parametrize("extra", ["cpu", "dev"])
def test_the_cpu_lock_has_what_is_required(extra: str) -> None:
    locked = pins((ROOT / "requirements-cpu.lock").read_text())
    unmet = {name: versions for name, versions in required(extra).items() if locked.get(name, "0") not in versions}
    assert not unmet


def test_the_megatron_core_required_is_the_one_that_patches_are_for() -> None:
    assert required("")["megatron-core"] == versions.SUPPORTED
    assert all(version in versions.SUPPORTED for version in versions.TESTED)


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_the_cuda_extra_resolves_within_the_supported_versions(python: str, tmp_path: Path) -> None:
    (tmp_path / "uv.toml").write_text(SOURCE_PACKAGES)
    target = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    command = [sys.executable, "-m", "uv", "pip", "compile", "setup.py", "--extra", "cuda", *target]
    command += ["--config-file", str(tmp_path / "uv.toml"), "--no-header", "--no-annotate"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    resolved = pins(done.stdout)
    for name, admitted in required("cuda", python).items():
        assert resolved[name] in admitted
    megatron, vllm = resolved["megatron-core"], resolved["vllm"]
    assert megatron == versions.TESTED[0 if python == "3.11" else -1]
    assert vllm == doctor.TESTED["vllm"]
    assert resolved["transformers"].startswith(doctor.TESTED["transformers"])
    engine = [resolved[name] for name in ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch")]
    assert len(set(engine)) == 1
    assert resolved["torch"].startswith("2.13.")
