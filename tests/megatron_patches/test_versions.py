"""Patches of megatron-core are applied to the versions that need them; a version that nobody looked at is refused."""

import re
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.moe import moe_utils, token_dispatcher

from megatron_rl.config import Config, ConfigError
from megatron_rl.distributed import device
from megatron_rl.megatron_patches import checkpointing, cpu_backend, versions


def applied(monkeypatch: pytest.MonkeyPatch, version: str, meant: str) -> bool:
    """Whether a patch for `meant` does something where `version` is installed."""
    calls = []
    monkeypatch.setattr(versions, "installed", lambda: version)
    monkeypatch.setattr(versions, "find_spec", lambda name: object())
    versions.patch(meant)(lambda: calls.append(1))()
    return bool(calls)


def test_a_patch_is_applied_to_its_versions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert applied(monkeypatch, "0.16.1", "<0.17")
    assert not applied(monkeypatch, "0.17.0", "<0.17")
    assert applied(monkeypatch, "0.19.2", ">=0.17")
    assert not applied(monkeypatch, "0.16.1", ">=0.17")


@pytest.mark.parametrize("version", ["0.16.0", "0.20.0", "0.20.0rc1", None])
def test_an_unknown_version_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setattr(versions, "installed", lambda: version)
    config = Config.model_validate({"model": {"path": "unused"}, "run_dir": "unused"})
    for refuse in (versions.check, lambda: device.check_device(config), *cpu_backend.PATCHES):
        with pytest.raises(ConfigError, match=re.escape("pip install 'megatron-core<0.20,>=0.16.1'")):
            refuse()


def test_a_version_that_imports_triton_is_refused_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    assert versions.fault("0.17.1") is None
    assert "pip install triton" in str(versions.fault("0.18.2"))


def test_what_a_patch_replaces_is_there() -> None:
    """A function that a release has renamed or dropped would be patched for nothing."""
    places = [
        filesystem_async,
        filesystem_async.FileSystemWriterAsync,
        param_and_grad_buffer,
        DistributedOptimizer,
        megatron_random,
        moe_utils,
        token_dispatcher,
    ]
    before = [dict(vars(place)) for place in places]
    try:
        for apply in (*cpu_backend.PATCHES, *checkpointing.PATCHES):
            apply()
        after = [dict(vars(place)) for place in places]
    finally:
        for place, names in zip(places, before, strict=True):
            restore(place, names)
    new = {name for old, now in zip(before, after, strict=True) for name in now.keys() - old.keys()}
    assert new <= {"te_general_gemm"}
    assert all(old != now for old, now in zip(before[2:5], after[2:5], strict=True))


def restore(place: Any, names: dict[str, Any]) -> None:
    """Undo what patches did to a module or class."""
    for name, value in dict(vars(place)).items():
        if name not in names:
            delattr(place, name)
        elif value is not names[name]:
            setattr(place, name, names[name])
