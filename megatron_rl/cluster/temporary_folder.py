"""A folder for what libraries leave in the system's temporary folder: it goes when the run ends.

torchrun, wandb, vLLM and torch each leave files behind, some in every process. All of them ask for `TMPDIR`.
"""

import contextlib
import fcntl
import getpass
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX, LOCK = "megatron-rl-", "lock"


@contextlib.contextmanager
def own_temporary_folder() -> Iterator[Path]:
    """Within the block, the temporary folder of this process and its children is one of their own.

    It is beside the others rather than in the run's folder, whose path may be too long for sockets or on a slow disk.
    What outlives a run on purpose stays where it was: Ray's logs and compiled kernels. Folders of runs that were killed
    go, too: they are known by a lock that nobody holds.
    """
    shared = Path(tempfile.gettempdir())
    _remove_left_behind(shared)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=shared))
    defaults = {"RAY_TMPDIR": str(shared), "TORCHINDUCTOR_CACHE_DIR": str(shared / f"torchinductor_{_user()}")}
    before = {name: os.environ.get(name) for name in ("TMPDIR", *defaults)}
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.environ["TMPDIR"], tempfile.tempdir = str(folder), None
        for name, default in defaults.items():
            os.environ.setdefault(name, default)
        try:
            yield folder
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            tempfile.tempdir = None
            shutil.rmtree(folder, ignore_errors=True)


def _remove_left_behind(shared: Path) -> None:
    for lock in shared.glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError), lock.open() as file:  # held, another user's, or gone meanwhile
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a name for this user
        return str(os.getuid())
