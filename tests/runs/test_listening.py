"""What a running job lets others reach: nothing, when it is all on one machine."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.drills import ended, experiment_file, start, wait_for_step

pytestmark = pytest.mark.slow

ASK = """
import sys
from ray._raylet import GcsClient
print("cluster", GcsClient(address=sys.argv[1]).cluster_id.hex())
"""


def sockets(root: psutil.Process) -> list[tuple[str, str, int]]:
    """(process, address, port) of all that `root` and its descendants listen on."""
    found = []
    for process in [root, *root.children(recursive=True)]:
        try:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.append((process.name(), connection.laddr.ip, connection.laddr.port))
        except psutil.NoSuchProcess:  # a probe that has ended meanwhile
            continue
    return found


def answer(address: str, token: str) -> subprocess.CompletedProcess:
    """What somebody with that token gets from the head of Ray at `address`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command = [sys.executable, "-c", ASK, address]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_a_job_on_one_machine_listens_on_loopback_alone_and_asks_for_a_token(tmp_path: Path) -> None:
    file = experiment_file(tmp_path, steps=500, parallel={"pp_size": 2}, rollout={"tp_size": 2})
    process = start(file)
    try:
        wait_for_step(process, tmp_path, 1)
        found = sockets(psutil.Process(process.pid))
        kinds = {name for name, _, _ in found}
        assert {"gcs_server", "raylet"} <= kinds and any("RolloutEng" in name for name in kinds), kinds
        outside = [
            each for each in found if not each[1].removeprefix("::ffff:").startswith("127.") and each[1] != "::1"
        ]
        assert outside == []

        (head,) = [
            child for child in psutil.Process(process.pid).children(recursive=True) if child.name() == "gcs_server"
        ]
        token = head.environ()["RAY_AUTH_TOKEN"]
        port = next(port for name, _, port in found if name == "gcs_server")
        assert "cluster" in answer(f"127.0.0.1:{port}", token).stdout
        refused = answer(f"127.0.0.1:{port}", "0" * len(token))
        assert refused.stdout == "" and "Authentication token is missing or incorrect" in refused.stderr
    finally:
        ended(process)
