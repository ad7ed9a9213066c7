"""A run over two hosts, played by two network namespaces that nothing but a virtual cable connects.

Trainer rank 0, with Ray's head, is on one; rank 1 and the engine are on the other. Requests, rollouts and what the
ranks tell each other cross the cable; weights go through shared memory, which on CPU needs one machine.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.drills import experiment_file, metrics, read, run, wait_until
from tests.launching import ROOT

STEPS = 3
PORT, RAY_PORT = 29577, 6399
TOKEN = "5f" * 32

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
    ),
]


@dataclass(frozen=True)
class Host:
    namespace: str
    address: str

    def ask(self, *command: str) -> str:
        done = subprocess.run([*self._inside, *command], check=True, capture_output=True, text=True, timeout=30)
        return done.stdout

    def start(self, log: Path, *arguments: str | Path, **variables: str) -> subprocess.Popen:
        """Python with these arguments, on this host."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
        environment |= {"GLOO_SOCKET_IFNAME": "job0", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with log.open("w") as out:
            return subprocess.Popen(
                [*self._inside, sys.executable, *map(str, arguments)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment | variables,
                cwd=ROOT,
            )

    def processes(self) -> list[psutil.Process]:
        pids = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True).stdout
        return [psutil.Process(int(pid)) for pid in pids.split() if psutil.pid_exists(int(pid))]

    def received_bytes(self) -> int:
        return int(json.loads(self.ask("ip", "-json", "-stats", "link", "show", "job0"))[0]["stats64"]["rx"]["bytes"])

    @property
    def _inside(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    hosts = [Host(f"megatron-rl-{os.getpid()}-{number}", f"10.77.0.{number + 1}") for number in (0, 1)]
    cable = [f"mrl{os.getpid() % 100000}x{number}" for number in (0, 1)]
    try:
        ip("netns", "add", hosts[0].namespace)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this container may not make network namespaces: {error.stderr.strip()}")
    try:
        ip("netns", "add", hosts[1].namespace)
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for host, end in zip(hosts, cable, strict=True):
            ip("link", "set", end, "netns", host.namespace)
            ip("-n", host.namespace, "link", "set", end, "name", "job0")
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "job0")
            ip("-n", host.namespace, "link", "set", "lo", "up")
            ip("-n", host.namespace, "link", "set", "job0", "up")
            # A host knows its address by where it would send a packet to the world.
            ip("-n", host.namespace, "route", "add", "default", "dev", "job0")
        yield hosts
    finally:
        for host in hosts:
            for process in host.processes():
                process.kill()
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True)


def test_trainers_and_engine_on_different_hosts_do_what_they_do_on_one(hosts: list[Host], tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    shared = {"parallel": {"pp_size": 2}, "rollout": {"verify_weights": True}}
    one = experiment_file(tmp_path / "one", STEPS, **shared)
    shutil.copytree(tmp_path / "one" / "model", tmp_path / "two" / "model")
    two = experiment_file(tmp_path / "two", STEPS, **shared)

    first, second = hosts
    ray_start = ["-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-cpus", "1"]
    here = ["--head", "--port", str(RAY_PORT), "--node-ip-address", first.address, "--include-dashboard=false"]
    there = ["--address", f"{first.address}:{RAY_PORT}", "--node-ip-address", second.address, "--num-gpus", "1"]
    first.start(tmp_path / "ray-head.log", *ray_start, *here)
    wait_until(lambda: f":{RAY_PORT} " in first.ask("ss", "-ltnH"), lambda: read(tmp_path / "ray-head.log"))
    second.start(tmp_path / "ray-worker.log", *ray_start, *there)
    ray_address = {"RAY_ADDRESS": f"{first.address}:{RAY_PORT}"}
    waiting = first.start(tmp_path / "wait.log", "-m", "megatron_rl.cluster.ray_nodes", "2", "120", **ray_address)
    assert waiting.wait(timeout=150) == 0, read(tmp_path / "wait.log") + read(tmp_path / "ray-worker.log")

    before = second.received_bytes()
    meeting = {"MASTER_ADDR": first.address, "MASTER_PORT": str(PORT), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    ranks = [
        host.start(
            tmp_path / f"rank-{number}.log",
            *("-m", "tests.runs.two_hosts_worker", two),
            **meeting,
            **ray_address,
            RANK=str(number),
        )
        for number, host in enumerate(hosts)
    ]
    logs = lambda: "".join(read(tmp_path / f"rank-{number}.log")[-3000:] for number in (0, 1))  # noqa: E731
    wait_until(lambda: '"step": 1,' in read(tmp_path / "two/run/metrics.jsonl"), logs, ranks[0])
    engines = [process for process in second.processes() if process.name().startswith("ray::RolloutEng")]
    assert len(engines) == 1, "the engine is on the other host than the driver"
    (store,) = [line for line in first.ask("ss", "-ltnH").splitlines() if f":{PORT} " in line]
    assert f"{first.address}:{PORT}" in store, "where the ranks meet is open to the job's network alone"
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0], logs()
    assert second.received_bytes() - before > 20_000

    run(one)
    assert sorted(metrics(tmp_path / "two/run")) == list(range(STEPS + 1))
    for step, values in metrics(tmp_path / "one/run").items():
        assert metrics(tmp_path / "two/run")[step] == pytest.approx(values, rel=1e-4, abs=1e-6), f"step {step}"
