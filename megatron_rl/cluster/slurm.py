"""`megatron-rl launch slurm`: an sbatch file for an experiment, checked against its layout.

The file has a head made here (what Slurm is asked for, and a few variables), and a body that is the same for all,
`slurm.sh` beside this file. `docs/slurm.md` says how a job runs.
"""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.cluster.model_shape import read_model_shape
from megatron_rl.config import Config, ConfigError
from megatron_rl.config.model_fit import check_layout, check_world_size

BODY = Path(__file__).with_suffix(".sh")
RAY_TIMEOUT_S = 300
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Job:
    """What the user asks of Slurm."""

    nodes: int
    gpus_per_node: int
    """0: machines without GPUs."""
    processes_per_node: int
    """Trainer processes; one per GPU where there are GPUs."""
    time: str = "24:00:00"
    """In Slurm's notation."""
    partition: str | None = None
    account: str | None = None
    grace_s: int = 600
    """How long before its time limit the job gets SIGTERM."""
    options: tuple[str, ...] = ()
    """More lines of the head, such as `--qos=high`."""


@dataclass(frozen=True)
class Nodes:
    """Which nodes of a job do what: trainers on the first ones."""

    trainers: int
    engines: int
    """With colocated engines the same nodes."""


def node_roles(config: Config, job: Job) -> Nodes:
    """Do the engines and the trainers fit on the nodes?

    Raises:
        ConfigError: naming the keys and the remedy.
    """
    rollout, gpus = config.rollout, job.gpus_per_node
    if job.nodes < 1:
        raise ConfigError(f"--nodes {job.nodes} must be at least 1.")
    if gpus == 0:
        if rollout.placement == "separate":
            raise ConfigError(
                "rollout.placement=separate needs GPUs, but --gpus-per-node is 0; use colocated or nodes with GPUs."
            )
        return Nodes(job.nodes, job.nodes)
    if job.processes_per_node != gpus:
        raise ConfigError(
            f"--processes-per-node {job.processes_per_node} with --gpus-per-node {gpus}: each GPU has one trainer "
            "process; leave the first out."
        )
    for key, size in (("parallel.tp_size", config.parallel.tp_size), ("rollout.tp_size", rollout.tp_size)):
        if gpus % size:
            raise ConfigError(
                f"{key}={size} does not divide the {gpus} GPUs of a node (--gpus-per-node); tensor parallelism has to "
                "stay within a node."
            )
    per_node = gpus // rollout.tp_size
    needed = math.ceil(rollout.engines / per_node)
    if rollout.placement == "colocated":
        if needed > job.nodes:
            raise ConfigError(
                f"rollout.engines={rollout.engines} of rollout.tp_size={rollout.tp_size} need {needed} nodes of {gpus} "
                f"GPUs, but --nodes is {job.nodes}; lower rollout.engines to {job.nodes * per_node} or ask for more "
                "nodes."
            )
        return Nodes(job.nodes, job.nodes)
    if needed >= job.nodes:
        raise ConfigError(
            f"rollout.placement=separate: rollout.engines={rollout.engines} of rollout.tp_size={rollout.tp_size} take "
            f"{needed} of --nodes {job.nodes} and leave none for the trainers; ask for more nodes or lower "
            "rollout.engines."
        )
    return Nodes(job.nodes - needed, needed)


def smallest_job(config: Config, nodes: int | None = None, gpus: int | None = None) -> Job:
    """The fewest GPUs, in nodes of at most eight, that the experiment fits; what is given stays.

    Engines on nodes of their own get as many nodes of trainers beside them, unless `parallel.dp_size` says how many
    there are. Where nothing fits it is the job whose checks say why.
    """
    parallel, rollout = config.parallel, config.rollout
    engines = rollout.engines * rollout.tp_size
    trainers = parallel.model_size * (parallel.dp_size or 1)
    sizes = [gpus] if gpus is not None else [GPUS_PER_NODE]
    if nodes is None and gpus is None:
        sizes = list(range(min(max(engines, trainers), GPUS_PER_NODE), GPUS_PER_NODE + 1))
    for size in filter(None, sizes):
        needed = math.ceil(engines / size)
        apart = rollout.placement == "separate"
        fewest = 2 * needed if apart and parallel.dp_size is None else 1
        most = fewest + needed + math.ceil(trainers * parallel.ep_size / size)
        for count in [nodes] if nodes is not None else range(fewest, most + 1):
            job = Job(count, size, size)
            try:
                check_world_size(config, node_roles(config, job).trainers * size)
            except ConfigError:
                continue
            return job
    return Job(nodes or 1, sizes[-1], sizes[-1])


def render(config: Config, job: Job, arguments: Sequence[str], workdir: Path) -> str:
    """The sbatch file.

    Args:
        config: the experiment.
        job: what is asked of Slurm.
        arguments: those of `megatron-rl train`.
        workdir: folder to run in, the same on all nodes.

    Raises:
        ConfigError: when the experiment does not fit the nodes.
    """
    roles = node_roles(config, job)
    check_layout(config, read_model_shape(config), roles.trainers * job.processes_per_node)
    run_dir = (workdir / config.run_dir).resolve()
    separate = config.rollout.placement == "separate"
    gpus = str(job.gpus_per_node) if job.gpus_per_node else ""
    variables = {
        "PYTHON": sys.executable,
        "WORKDIR": str(workdir),
        "RUN_DIR": str(run_dir),
        "GPUS": gpus,
        "HEAD_GPUS": "0" if separate else gpus,
        "TRAINER_NODES": str(roles.trainers),
        "PROCESSES": str(job.processes_per_node),
        "RAY_WORKERS_FROM": str(roles.trainers if separate else 1),
        "RAY_TIMEOUT_S": str(RAY_TIMEOUT_S),
    }
    lines = [
        "#!/bin/bash",
        f"# {' '.join(['megatron-rl', 'train', *map(shlex.quote, arguments)])}",
        f"# {describe(config, job, roles)}",
        *(f"#SBATCH {option}" for option in _options(job, run_dir)),
        *(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
        f"ARGUMENTS=({' '.join(map(shlex.quote, arguments))})",
    ]
    return "\n".join(lines) + "\n" + BODY.read_text()


def describe(config: Config, job: Job, roles: Nodes) -> str:
    """The layout in one sentence."""
    parallel, rollout = config.parallel, config.rollout
    world = roles.trainers * job.processes_per_node
    sizes = [f"tp {parallel.tp_size}", f"pp {parallel.pp_size}", f"dp {world // parallel.model_size}"]
    sizes += [f"{name} {size}" for name, size in (("cp", parallel.cp_size), ("ep", parallel.ep_size)) if size > 1]
    trainers = f"{world} trainer processes ({', '.join(sizes)}) on {_count(roles.trainers)}"
    where = f"on {_count(roles.engines)} of their own" if rollout.placement == "separate" else "beside them"
    return f"{trainers}; {rollout.engines} engine(s) of tp {rollout.tp_size} {where}"


def _count(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"


def _options(job: Job, run_dir: Path) -> list[str]:
    options = [
        f"--job-name={shlex.quote(run_dir.name)}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.processes_per_node}",
        "--exclusive",
        f"--time={job.time}",
        f"--output={shlex.quote(f'{run_dir}/slurm/%j.log')}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:TERM@{job.grace_s}",
    ]
    if job.gpus_per_node:
        options.append(f"--gpus-per-node={job.gpus_per_node}")
    if job.partition is not None:
        options.append(f"--partition={job.partition}")
    if job.account is not None:
        options.append(f"--account={job.account}")
    return options + list(job.options)


def write_job(config: Config, job: Job, arguments: Sequence[str], output: Path | None) -> Path:
    """Render to `output`, or to `run_dir/slurm/job.sbatch`; returns the file. Raises as `render` does."""
    workdir = Path.cwd()
    text = render(config, job, arguments, workdir)
    # Slurm does not make the folder of the job's log, and without it the job fails and says nothing.
    logs = workdir / config.run_dir / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    file = output or logs / "job.sbatch"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file
