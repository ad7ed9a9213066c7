"""What libraries leave in the temporary folder goes with the run."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_rl.cluster.temporary_folder import own_temporary_folder
from tests.launching import ROOT


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("RAY_TMPDIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_what_this_process_and_its_children_leave_is_gone_afterwards(shared: Path) -> None:
    leave = "import tempfile; tempfile.mkdtemp(prefix='wandb-'); print(tempfile.mkdtemp(prefix='torchelastic_'))"
    before = dict(os.environ)
    with own_temporary_folder() as folder:
        assert Path(tempfile.mkdtemp()).parent == folder and folder.parent == shared
        done = subprocess.run([sys.executable, "-c", leave], capture_output=True, text=True, check=True)
        assert Path(done.stdout.strip()).parent == folder
        assert os.environ["RAY_TMPDIR"] == str(shared), "Ray's logs are for after the run"
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == shared, "the next run has the same kernels"
    assert list(shared.iterdir()) == [] and dict(os.environ) == before
    assert tempfile.gettempdir() == str(shared)


def test_what_a_killed_run_left_goes_with_the_next_one_and_a_living_run_keeps_its_own(shared: Path) -> None:
    code = (
        "from megatron_rl.cluster.temporary_folder import own_temporary_folder\n"
        "with own_temporary_folder() as folder:\n    print(folder, flush=True)\n    input()\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(2)
    ]
    killed, living = (Path(run.stdout.readline().strip()) for run in runs)
    runs[0].send_signal(signal.SIGKILL)
    runs[0].wait()
    assert killed.exists() and living.exists()
    with own_temporary_folder():
        assert not killed.exists() and living.exists()
    runs[1].communicate("\n", timeout=60)
    assert list(shared.iterdir()) == []


def test_a_failing_run_leaves_nothing_either(shared: Path) -> None:
    with pytest.raises(RuntimeError, match="a failure"), own_temporary_folder():
        raise RuntimeError("a failure")
    assert list(shared.iterdir()) == []
