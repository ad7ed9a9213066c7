"""What dies or goes wrong during a run: named in the log, and nothing lost or changed by it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.models.manifest import damage
from tests.drills import (
    alive,
    ended,
    experiment_file,
    family,
    metrics,
    rank,
    read,
    run,
    start,
    wait_for_step,
    wait_until,
)

pytestmark = pytest.mark.slow

STEPS = 4
PARTS = {"parallel": {"pp_size": 2}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(experiment_file(folder, STEPS, **PARTS))
    assert all(values["optim/grad_norm"] > 0 for step, values in metrics(folder / "run").items() if step > 0)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A folder for the same run."""
    shutil.copytree(whole / "model", tmp_path / "model")
    return tmp_path


def assert_same(folder: Path, whole: Path) -> None:
    found, expected = metrics(folder / "run"), metrics(whole / "run")
    assert sorted(found) == sorted(expected) == list(range(STEPS + 1))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4, abs=1e-6), f"step {step}"


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_rank_ends_the_run_which_resumes_as_if_nothing_had_happened(
    folder: Path, whole: Path, number: int
) -> None:
    file = experiment_file(folder, STEPS, **PARTS)
    process = start(file)
    try:
        wait_for_step(process, folder, 1)
        started = family(process)
        rank(process, number).kill()
        assert process.wait(timeout=120) == 137
        wait_until(lambda: not any(map(alive, started)), lambda: str(list(filter(alive, started))), seconds=60)
    finally:
        ended(process)
    last = read(folder / "log.txt").splitlines()[-1]
    assert last.startswith(f"trainer process {number} was ended by SIGKILL")
    run(file)
    assert_same(folder, whole)


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_killed_ray_ends_the_run_which_resumes_as_if_nothing_had_happened(
    folder: Path, whole: Path, name: str
) -> None:
    file = experiment_file(folder, STEPS, **PARTS)
    process = start(file)
    try:
        wait_for_step(process, folder, 1)
        started = family(process)
        (victim,) = [child for child in started if child.name() == name]
        victim.kill()
        assert process.wait(timeout=240) != 0
        wait_until(lambda: not any(map(alive, started)), lambda: str(list(filter(alive, started))), seconds=60)
    finally:
        ended(process)
    assert "Ray" in read(folder / "log.txt").splitlines()[-1]
    run(file)
    assert_same(folder, whole)


def test_a_truncated_newest_checkpoint_is_passed_over(folder: Path, whole: Path) -> None:
    file = experiment_file(folder, STEPS, **PARTS)
    shutil.copytree(whole / "run", folder / "run")
    checkpoints = folder / "run" / "checkpoints"
    shutil.rmtree(checkpoints / f"step_{STEPS:06d}")
    newest = checkpoints / f"step_{STEPS - 1:06d}"
    data = max((newest / "megatron").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)
    run(file)
    lines = [line for line in read(folder / "log.txt").splitlines() if "is damaged" in line]
    assert len(lines) == 1 and str(newest) in lines[0] and f"resuming after step {STEPS - 2}" in lines[0]
    assert damage(newest) is None, "the step was done again, and its checkpoint is whole"
    assert_same(folder, whole)


@pytest.fixture
def disk(folder: Path) -> Iterator[Path]:
    """The run's folder on a file system of 64 megabytes."""
    if os.geteuid() != 0:
        pytest.skip("a file system is mounted by root")
    place = folder / "run"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("this container may not mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_disk_that_fills_up_ends_the_run_and_keeps_its_checkpoints(folder: Path, whole: Path, disk: Path) -> None:
    file = experiment_file(folder, STEPS, **PARTS)
    process = start(file)
    try:
        wait_for_step(process, folder, 1)
        wait_until(lambda: (disk / "checkpoints" / "step_000001").exists(), process=process)
        room = shutil.disk_usage(disk).free - 300_000  # enough for lines of metrics, too little for a checkpoint
        (disk / "ballast").write_bytes(bytes(room))
        assert process.wait(timeout=120) == 1
    finally:
        ended(process)
    last = read(folder / "log.txt").splitlines()[-1]
    assert "could not be written (No space left on device" in last and "start again" in last
    kept = [path for path in (disk / "checkpoints").iterdir() if damage(path) is None]
    assert kept and not list((disk / "checkpoints").glob("*.tmp"))
    (disk / "ballast").unlink()
    run(file)
    assert_same(folder, whole)


HANGING = """
import time

def score(prompt, response, answer):
    if answer == "hang":
        time.sleep(60)
    return float(len(response) % 2)
"""


def test_a_hanging_reward_and_a_poisoned_line_are_named_and_cost_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "hanging_reward.py").write_text(HANGING)
    lines = [f'{{"id": "p{i}", "prompt": "{i}+{i}=", "answer": "{"hang" if i == 1 else i}"}}' for i in range(4)]
    lines.insert(2, '{"id": "p9", "prompt": "1+')
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(lines) + "\n")
    file = experiment_file(
        tmp_path,
        2,
        data={"train": str(data), "max_left_out": 0.2},
        reward={"function": "hanging_reward:score", "timeout_s": 0.5},
    )
    run(file)
    log = read(tmp_path / "log.txt")
    assert f"1 of 5 records left out (1 not a JSON object: {data}:3)" in log
    assert "reward of record p1: no result after reward.timeout_s=0.5 seconds; counted as 0" in log
    steps = metrics(tmp_path / "run")
    assert [steps[step]["reward/timeouts"] for step in (1, 2)] == [4, 4], "one prompt, four responses"
    assert all(steps[step]["reward/std"] > 0 for step in (1, 2)), "the others are scored"
