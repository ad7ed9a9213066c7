"""From `megatron-rl train` to one trainer process per device.

Three ways lead to trainer processes, tried in this order: this process already is one (a user's torchrun set RANK,
WORLD_SIZE and LOCAL_RANK); it is a task of a Slurm step with several tasks (`srun -n N megatron-rl train ...`), whose
variables are translated; otherwise it starts torchrun itself, on this machine. Everything that can be checked without
a process group is checked before that.
"""

import contextlib
import ctypes
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.cluster.temporary_folder import own_temporary_folder
from megatron_rl.config import Config, ConfigError
from megatron_rl.config.families import scratch_config
from megatron_rl.config.hub import pin_model
from megatron_rl.config.model_fit import check_layout, read_hf_config

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
LAUNCHER_PID = "MEGATRON_RL_LAUNCHER_PID"
PR_SET_PDEATHSIG = 1  # of prctl(2)
TORCHRUN_PATIENCE_S = 30  # how long torchrun waits between SIGTERM and SIGKILL


def launch(config: Config, command: str, arguments: Sequence[str], run: Callable[[Config], None]) -> int:
    """Run `run(config)` in every trainer process, which this process is or starts.

    Args:
        config: the experiment.
        command: `train`, `sft` or `drafter warmup`.
        arguments: what follows the command on the command line; the trainer processes get the same.
        run: entry point of a trainer process.

    Returns:
        The exit status for this process.

    Raises:
        ConfigError: when the experiment cannot run as configured.
    """
    named, config = config.model.path, pin_model(config)
    if all(name in os.environ for name in TORCHRUN_VARIABLES):
        return _run_here(config, command, run)
    check_experiment(config, command)
    program = ["-m", "megatron_rl.cli", *command.split(), *arguments]
    if config.model.path != named:  # the trainer processes take the same commit
        program.append(f"model.path={config.model.path}")
    task = slurm_task(os.environ)
    if task is not None:
        environment = process_environment(config, int(task["LOCAL_WORLD_SIZE"]), {**os.environ, **task})
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *program], environment)
    from megatron_rl.distributed.device import default_world_size

    processes = default_world_size(config)
    os.environ.update(process_environment(config, processes, os.environ))
    return start_processes(processes, program)


def check_experiment(config: Config, command: str) -> None:
    """All checks without a process group: model against layout, the user's own modules, and what this machine can do.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    if command == "sft" and config.model.scratch is not None and not (Path(config.model.path) / "config.json").exists():
        check_layout(config, scratch_config(config.model.scratch))
    else:
        check_layout(config, read_hf_config(config.model.path, config.model.family))
        check_model(config, engines=command != "sft")
    if command != "sft" and find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed; install megatron-rl[cpu] or, with GPUs, megatron-rl[cuda].")
    check_extensions(config, command)
    from megatron_rl.distributed.device import check_device

    check_device(config)


def check_model(config: Config, engines: bool) -> None:
    """Whether the model's files hold it, whole and nothing else, and whether engines can run it.

    Args:
        config: the experiment.
        engines: whether there will be engines.

    Raises:
        ConfigError: naming the file or tensor.
    """
    from megatron_rl.distributed.device import check_head_dim
    from megatron_rl.models.architecture import Architecture
    from megatron_rl.models.stored_tensors import StoredTensors, has_hf_weights, has_megatron_weights

    arch = Architecture.from_folder(config.model.path, config.model.family)
    if engines:
        check_head_dim(config, arch.head_dim)
    if has_megatron_weights(config.model.path):
        return  # loading says what a checkpoint lacks
    if config.model.scratch is None or has_hf_weights(config.model.path):
        StoredTensors(config.model.path, arch)


def check_extensions(config: Config, command: str) -> None:
    """Whether the user's algorithm and data sources that `command` needs can be imported, before engines start.

    The reward is not imported here: it may be anything, and has processes of its own.

    Raises:
        ConfigError: naming the key and the reason.
    """
    from megatron_rl.data.rows import find_function, is_function

    sources = [("data.train", config.data.train)] if command != "eval" else []
    sources += [("data.eval", name) for name in config.data.eval] if command in ("train", "eval") else []
    for key, name in sources:
        if is_function(name):
            find_function(name, key)
    if command == "train":
        from megatron_rl.algorithms import load_algorithm

        load_algorithm(config.algorithm)


def process_environment(config: Config, processes_per_node: int, user: Mapping[str, str]) -> dict[str, str]:
    """Environment of a trainer process: thread counts and allocator settings, unless the user has set them."""
    from megatron_rl.distributed import device

    return {**device.process_environment(config, processes_per_node), **user}


def slurm_task(environ: Mapping[str, str]) -> dict[str, str] | None:
    """torchrun's variables for a task of a Slurm step with several tasks, or None for any other process.

    `SLURM_STEP_NUM_TASKS` is set by srun alone, so a batch script or an interactive shell is not taken for a task.

    Raises:
        ConfigError: when Slurm's variables cannot be understood.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if int(tasks) == 1:
        return None
    try:
        nodes = environ["SLURM_STEP_NODELIST"]
        per_node = expand_counts(environ["SLURM_STEP_TASKS_PER_NODE"])
        return {
            "RANK": environ["SLURM_PROCID"],
            "WORLD_SIZE": tasks,
            "LOCAL_RANK": environ["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(per_node[int(environ["SLURM_NODEID"])]),
            "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(nodes),
            # One job gets one port, and jobs that share a node rarely get the same one.
            "MASTER_PORT": environ.get("MASTER_PORT") or str(20000 + int(environ["SLURM_JOB_ID"]) % 20000),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"this looks like a task of a Slurm step, but its variables are incomplete ({error}); "
            "start with `srun` inside an allocation, or with torchrun (launch/multinode.sh)."
        ) from None


def expand_counts(text: str) -> list[int]:
    """Slurm's tasks per node: `4(x2),3` means [4, 4, 3]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, repeat = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(repeat or 1)
    return counts


def first_host(nodes: str) -> str:
    """First name of a Slurm node list: `gpu[007-009,12],login` means gpu007."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise ValueError(f"node list {nodes!r}")
    return "".join(part or "" for part in found.groups())


def die_with_launcher() -> None:
    """torchrun gives each process a session of its own; without this a SIGKILL of the launcher leaves them running."""
    if os.environ.get(LAUNCHER_PID) == str(os.getppid()) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.environ[LAUNCHER_PID] != str(os.getppid()):  # it died between the two lines above
            os._exit(1)


def start_processes(processes: int, program: Sequence[str]) -> int:
    """Run `program` (arguments of Python) under torchrun on this machine; returns the exit status for this process."""
    os.environ[LAUNCHER_PID] = str(os.getpid())
    from rollout.tcp_store import bind_torchrun

    # All processes are on this machine, so nothing has to listen on its other addresses.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    bind_torchrun()
    # In this process rather than `python -m torch.distributed.run`: its own traceback would bury the first error.
    with own_temporary_folder():
        return _run_torchrun(processes, program)


def _run_torchrun(processes: int, program: Sequence[str]) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        options = parse_args(
            ["--standalone", "--local-addr", "localhost", "--nproc-per-node", str(processes), *program]
        )  # type: ignore[no-untyped-call]
        run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as failure:
        return _report(failure)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


def _run_here(config: Config, command: str, run: Callable[[Config], None]) -> int:
    """This process is a trainer process: run, and leave the first error where torchrun finds it."""
    from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def checked_run() -> None:
        if os.environ.get(LAUNCHER_PID) is None:  # the user's own launcher: nobody has checked anything yet
            check_experiment(config, command)
        run(config)

    die_with_launcher()
    silence_known_warnings()
    # A launcher of ours has made the folder for all of its processes.
    alone = os.environ.get(LAUNCHER_PID) is None
    with own_temporary_folder() if alone else contextlib.nullcontext():
        checked_run()
    return 0


def silence_known_warnings() -> None:
    """Keep quiet about what nobody who trains can act on.

    megatron-core says at import that Transformer Engine and Apex are missing, which `doctor` says better. From 0.18 on
    it reads checkpoints on each rank alone, of which torch warns; in 0.19 it prefers another class to `GPTModel`.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", message=".*is not a leaf Tensor", category=UserWarning)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    warnings.filterwarnings("ignore", message="The argument order of load has been changed", category=UserWarning)
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|megatron\.")
    warnings.filterwarnings("ignore", message=".*deprecating ShardedTensor", category=FutureWarning)


def _report(failure: "ChildFailedError") -> int:
    """Say which process failed first and why, as the last lines of the log; returns its exit status."""
    rank, first = failure.get_first_failure()
    # The others notice at once that a process is gone, and a killed one has the time of this report. If that is so much
    # later, it hung because of the first failure until torchrun's patience was over.
    killed = [
        item
        for item in failure.failures.items()
        if item[1].exitcode == -signal.SIGKILL and item[1].timestamp - first.timestamp < TORCHRUN_PATIENCE_S
    ]
    rank, first = killed[0] if killed else (rank, first)
    if first.exitcode < 0:
        reason = f"was ended by {first.signal_name()}"
        if first.exitcode == -signal.SIGKILL:
            reason += " (often the kernel, out of memory: see `dmesg`)"
    else:
        recorded = first.message  # a dict when `record` has written it
        text = recorded["message"] if isinstance(recorded, dict) else f"exit status {first.exitcode}"
        reason = f"failed first: {text}"
    print(f"trainer process {rank} {reason}", file=sys.stderr)
    return int(first.exitcode) if first.exitcode > 0 else 128 - int(first.exitcode)
