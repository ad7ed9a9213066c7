"""`megatron-rl plan`: what an experiment needs and may give on GPUs, before it runs. See docs/plan.md."""

from pathlib import Path

from rich.table import Table

from megatron_rl.cluster.model_shape import read_model_shape
from megatron_rl.cluster.plan_memory import (
    EngineMemory,
    Memory,
    active_parameters,
    engine_memory,
    model_parameters,
    trainer_memory,
)
from megatron_rl.cluster.plan_speed import (
    GPUS,
    Gpu,
    Workload,
    bubble_fraction,
    generation,
    microbatches,
    step_time,
    sync_bytes,
)
from megatron_rl.cluster.slurm import Job, describe, node_roles
from megatron_rl.config import Config, ConfigError
from megatron_rl.config.model_fit import check_layout
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.stored_tensors import StoredTensors, has_hf_weights
from megatron_rl.observability.terminal import Terminal, standard_output

GIB = 2**30
DEFAULT_SHARE = 0.5
"""Mean length over the limit, for prompts and responses whose lengths the user does not give."""


def plan(config: Config, job: Job, gpu_name: str, prompt_tokens: int | None, response_tokens: int | None) -> None:
    """Print the plan of `config` on the nodes of `job`.

    Args:
        config: the experiment.
        job: nodes and GPUs.
        gpu_name: one of `GPUS`.
        prompt_tokens, response_tokens: mean lengths; None: half of the limits.

    Raises:
        ConfigError: when the experiment does not fit the nodes, or `gpu_name` is not known.
    """
    if gpu_name not in GPUS:
        raise ConfigError(f"--gpu {gpu_name} is not known; use one of {', '.join(GPUS)}.")
    if job.gpus_per_node == 0:
        raise ConfigError("--gpus-per-node 0: a plan is about GPUs; give at least 1.")
    gpu, roles = GPUS[gpu_name], node_roles(config, job)
    hf = read_model_shape(config)
    world = roles.trainers * job.gpus_per_node
    check_layout(config, hf, world)
    arch = Architecture.from_hf(hf, config.model.family)
    if Path(config.model.path).is_dir() and has_hf_weights(config.model.path):
        StoredTensors(config.model.path, arch)
    load = Workload(
        prompt_tokens or config.data.max_prompt_tokens * DEFAULT_SHARE,
        response_tokens or config.rollout.max_tokens * DEFAULT_SHARE,
        config.train.prompts_per_step * config.algorithm.group_size,
    )
    dp = world // config.parallel.model_size
    out = standard_output()
    size = f"{model_parameters(arch) / 1e9:.2f} B parameters"
    if arch.experts:
        size += f", {active_parameters(arch) / 1e9:.2f} B active"
    out.print(f"{size}; {describe(config, job, roles)}; {job.gpus_per_node} GPUs per node")
    out.print(
        f"per step {load.sequences} sequences of {load.prompt_tokens:.0f} + {load.response_tokens:.0f} tokens (mean)"
    )
    _print_memory(out, config, arch, gpu, load, dp)
    _print_speed(out, config, arch, gpu, load, dp)


def fullest_stage(config: Config, arch: Architecture, load: Workload, dp: int) -> Memory:
    """Memory of a trainer's GPU of the pipeline stage that needs most."""
    count = microbatches(config, load, dp)
    stages = range(config.parallel.pp_size)
    return max((trainer_memory(config, arch, dp, count, stage) for stage in stages), key=lambda memory: memory.total)


def gpu_total(config: Config, trainer: Memory, engine: EngineMemory) -> float:
    """Bytes that a trainer's GPU needs at its peak. A sleeping engine gives its memory back to the trainer."""
    if config.rollout.placement == "separate":
        return trainer.total
    if config.rollout.sleep:
        return max(trainer.total, engine.share + trainer.total - trainer.activations - trainer.logits)
    return trainer.total + engine.share


def _print_memory(out: Terminal, config: Config, arch: Architecture, gpu: Gpu, load: Workload, dp: int) -> None:
    memory = fullest_stage(config, arch, load, dp)
    engines = {kind: engine_memory(config, arch, gpu.memory, kind) for kind in dict.fromkeys(config.rollout.precisions)}
    tightest = min(engines.values(), key=lambda engine: engine.cache)
    table = Table("memory per GPU")
    table.add_column("GiB", justify="right")
    for name, size in memory.parts():
        if size:
            table.add_row(name if config.parallel.pp_size == 1 else f"{name} (stage {memory.stage})", _gib(size))
    if config.rollout.placement == "colocated":
        table.add_row("engine (vLLM)", _gib(tightest.share))
    total = gpu_total(config, memory, tightest)
    table.add_row("at the peak", _gib(total))
    table.add_row("of", _gib(gpu.memory))
    out.print(table)
    if total > gpu.memory:
        out.print(
            f"does not fit: {_gib(total - gpu.memory)} GiB too much. Lower train.tokens_per_microbatch or "
            "rollout.vllm.gpu_memory_utilization, set rollout.sleep=1, recompute activations "
            "(train.recompute=full), or split further (parallel.*, more nodes).",
        )
    for kind, engine in engines.items():
        name = "engine" if kind == "none" else f"{kind} engine"
        if engine.cache <= 0:
            out.print(f"does not fit: the weights of the {name} ({_gib(engine.weights)} GiB) leave it no room")
            continue
        out.print(
            f"{name}: weights {_gib(engine.weights)} GiB per GPU, keys and values {_gib(engine.cache)} GiB = "
            f"{engine.cache / engine.per_token:,.0f} tokens",
        )


def _print_speed(out: Terminal, config: Config, arch: Architecture, gpu: Gpu, load: Workload, dp: int) -> None:
    count = microbatches(config, load, dp)
    out.print(
        f"{count} micro-batches of {config.train.tokens_per_microbatch:,} tokens per optimizer step and replica; "
        f"{bubble_fraction(config.parallel.pp_size, count):.1%} of a pass is pipeline bubble",
    )
    size = sync_bytes(config, arch)
    out.print(f"weight sync: {size / 1e9:.1f} GB to each engine, {size * config.rollout.engines / 1e9:.1f} GB in all")
    for kind in dict.fromkeys(config.rollout.precisions):
        speed = generation(config, arch, gpu, load, kind)
        name = "engine" if kind == "none" else f"{kind} engine"
        out.print(
            f"{name}: {speed.tokens_per_s:,.0f} tokens/s with {speed.batch:,.0f} requests; limited by {speed.limit}",
        )
    seconds = step_time(config, arch, gpu, load, dp)
    table = Table("phase")
    table.add_column("s", justify="right")
    table.add_column("share", justify="right")
    for name, value in seconds.phases().items():
        if value:
            table.add_row(name, f"{value:.1f}", f"{value / seconds.total:.0%}")
    table.add_row("step", f"{seconds.total:.1f}", "")
    out.print(table)
    slowest = max(seconds.phases(), key=lambda name: seconds.phases()[name])
    generated = load.sequences * load.response_tokens
    out.print(
        f"expected: {generated / seconds.total:,.0f} response tokens/s over the whole step, "
        f"{load.tokens / seconds.update:,.0f} tokens/s in the update; {slowest} limits the step. "
        "Without drafts and reuse of old responses, and with responses of equal length.",
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
