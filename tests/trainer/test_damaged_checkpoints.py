"""A checkpoint that has lost data is passed over for the one before; a disk that is full costs no earlier one."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.config import Config, ConfigError
from megatron_rl.models.manifest import MANIFEST, damage, write_manifest
from megatron_rl.preflight import step_to_resume
from megatron_rl.trainer.checkpoint import checkpoint_folder, damaged_checkpoints, latest_step, remove_old_checkpoints
from tests.hf_models import make_models
from tests.launching import run_workers

DATA = "megatron/__0_0.distcp"


def write(run_dir: Path, step: int) -> Path:
    folder = checkpoint_folder(run_dir, step)
    (folder / "megatron").mkdir(parents=True)
    (folder / DATA).write_bytes(b"x" * 5000)
    (folder / "config.json").write_text("{}")
    write_manifest(folder)
    return folder


def truncate(folder: Path) -> None:
    os.truncate(folder / DATA, 1024)


def config(run_dir: Path) -> Config:
    return Config.model_validate({"model": {"path": "m"}, "run_dir": str(run_dir)})


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (truncate, f"{DATA} has 1,024 of 5,000 bytes"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: os.truncate(folder / MANIFEST, 7), "its manifest is cut off"),
        (lambda folder: os.truncate(folder / MANIFEST, 0), "its manifest is cut off"),
    ],
    ids=["truncated", "missing", "manifest truncated", "manifest empty"],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, harm, words: str) -> None:
    write(tmp_path, 5)
    newest = write(tmp_path, 10)
    assert latest_step(tmp_path) == 10 and damaged_checkpoints(tmp_path) == {}
    harm(newest)
    assert step_to_resume(config(tmp_path)) == 5
    assert damaged_checkpoints(tmp_path) == {newest: words}


def test_damaged_checkpoints_neither_count_among_those_kept_nor_go(tmp_path: Path) -> None:
    older, whole, newest = (write(tmp_path, step) for step in (5, 10, 15))
    truncate(newest)
    remove_old_checkpoints(tmp_path, keep=1)
    assert [folder.exists() for folder in (older, whole, newest)] == [False, True, True]


def test_without_any_that_is_whole_nothing_starts_over_unasked(tmp_path: Path) -> None:
    truncate(write(tmp_path, 5))
    with pytest.raises(
        ConfigError, match=r"step_000005 is damaged \(.*1,024 of 5,000 bytes\).*remove it to start from"
    ):
        step_to_resume(config(tmp_path))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    if os.geteuid() != 0:
        pytest.skip("a file system is mounted by root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this container may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_earlier_checkpoint_stays(small_disk: Path, tmp_path: Path) -> None:
    printed = run_workers("tests.trainer.full_disk_worker", 2, make_models(tmp_path)["qwen3"], small_disk)
    errors = [line for line in printed.splitlines() if line.startswith("rank ")]
    assert [error[:7] for error in sorted(errors)] == ["rank 0:", "rank 1:"]
    for error in errors:
        assert f"{checkpoint_folder(small_disk, 2)} could not be written (No space left on device" in error
        assert "GB are free there" in error
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step_000001"], "no draft fills the disk"
    assert damage(checkpoint_folder(small_disk, 1)) is None
