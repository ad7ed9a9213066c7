"""Pipeline bubbles filled with slices: how much of the idle time is used, and what it does to the step time.

    python benchmarks/bench_bubbles.py [--quick] [--json FILE]

Ranks over gloo, one thread each, run megatron-core's 1F1B schedule with 4 micro-batches; filled and unfilled steps
alternate. A slice is the forward and backward pass of one small transformer layer. `fill` is the time spent in slices
within waits, over the time that unfilled steps spend waiting (or filled ones, if that is more); a step's cost is the
median over pairs of neighbouring steps.

"computed" stages and slices really compute. Where there are fewer cores than ranks, a rank that waits leaves its core
to another one: there is no idle time to use, filling must slow the step down, and the row shows by how much. "timed"
stages and slices sleep for as long as they would take, as if each rank had a device of its own, which its host waits
for: they show what the scheduling of slices does, over real communication, and nothing about computing.
The ratios are those of computed stages where the cores suffice, else those of timed stages; the names of the ratios
`..._computed` and `..._timed` tell them apart. `filled_vs_unfilled_step` is the worse of PP=2 and PP=4, on that rule.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from _common import finish, parse_arguments
from drafter.idle_time.pipeline_bubbles import BubbleCommunicator
from drafter.idle_time.slices import Fits, SliceRunner
from megatron_rl.drafting.wait_fill import idle_fill
from megatron_rl.megatron_patches import cpu_backend

HIDDEN, TOKENS, MICROBATCHES, LAYERS = 256, 128, 4, 8
SLICE_HIDDEN, SLICE_TOKENS = 128, 64
TIMED_FORWARD, TIMED_SLICE = 0.023, 0.002
WARMUP_PAIRS = 4


@dataclass(frozen=True)
class Case:
    """One pipeline to measure."""

    stages: int
    timed: bool
    pairs: int
    """Filled steps, each beside an unfilled one."""

    @property
    def name(self) -> str:
        return f"pp{self.stages}_{'timed' if self.timed else 'computed'}"


class Layer(torch.nn.Module):
    """A transformer layer without dropout: attention and a gated feed-forward."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(hidden) for _ in range(2))
        self.qkv, self.out = torch.nn.Linear(hidden, 3 * hidden), torch.nn.Linear(hidden, hidden)
        self.up, self.down = torch.nn.Linear(hidden, 4 * hidden), torch.nn.Linear(2 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, 1, hidden] -> the same shape."""
        query, key, value = (
            part.unflatten(-1, (-1, 64)).permute(1, 2, 0, 3) for part in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.permute(2, 0, 1, 3).flatten(2))
        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(torch.nn.functional.silu(gate) * up)


class Sleep(torch.autograd.Function):
    """A stage that takes its time without a core: the backward pass twice the forward one."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        """Identity, late."""
        time.sleep(TIMED_FORWARD)
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Identity, later."""
        time.sleep(2 * TIMED_FORWARD)
        return gradient


class Stage(torch.nn.Module):
    """One stage of the pipeline, as megatron-core's schedules want it."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: TransformerConfig, timed: bool) -> None:
        super().__init__()
        self.config, self.received = config, None
        self.layers = torch.nn.Sequential(*(() if timed else (Layer(HIDDEN) for _ in range(LAYERS))))
        self.timed = timed

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        """Called by the schedule with what the previous stage sent."""
        self.received = tensors[0]

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """[tokens, 1, hidden] -> the same shape; `data` counts on the first stage only."""
        x = data if self.received is None else self.received
        return Sleep.apply(x) if self.timed else self.layers(x)


class DrafterLayer:
    """Slices: forward and backward passes of a small layer, without end."""

    size = 1

    def __init__(self, timed: bool) -> None:
        self.timed, self.layer = timed, Layer(SLICE_HIDDEN)
        self.rows = torch.randn(SLICE_TOKENS, 1, SLICE_HIDDEN)

    def next(self, fits: Fits) -> "DrafterLayer":
        """The next slice."""
        return self

    def run(self) -> None:
        """One slice; the gradients accumulate."""
        if self.timed:
            time.sleep(TIMED_SLICE)
        else:
            self.layer(self.rows).square().mean().backward()


def join(rank: int, stages: int, store: str) -> TransformerConfig:
    """Enter the process group of the case."""
    torch.set_num_threads(1)
    file_store = torch.distributed.FileStore(store, stages)
    torch.distributed.init_process_group("gloo", store=file_store, rank=rank, world_size=stages)
    cpu_backend.install()
    parallel_state.initialize_model_parallel(1, stages)
    return TransformerConfig(
        num_layers=stages * LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        use_cpu_initialization=True,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=False,
    )


def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """What the schedule calls for each micro-batch."""
    return model(next(iterator)), lambda output: (output.square().mean(), {})


def run_rank(rank: int, case: Case, store: str, results: Any) -> None:
    """Measure in one rank; the first one puts (step seconds, stats of all ranks) of both kinds of step to `results`."""
    config = join(rank, case.stages, store)
    stage = Stage(config, case.timed)
    fill = idle_fill(SliceRunner(DrafterLayer(case.timed)))
    communicator = BubbleCommunicator(parallel_state.get_pipeline_model_parallel_group(), config, fill)
    config.finalize_model_grads_func = communicator.flushing(lambda *arguments, **options: None)
    data = [torch.randn(TOKENS, 1, HIDDEN) for _ in range(MICROBATCHES)]
    steps: dict[bool, list[float]] = {False: [], True: []}
    waits: dict[bool, list[tuple[float, float, float, int]]] = {False: [], True: []}
    for step in range(-2 * WARMUP_PAIRS, 2 * case.pairs):
        # Swapping the order within pairs cancels what favours the first or the second.
        filled = communicator.filling = (step % 2 == 0) ^ (step // 2 % 2 == 0)
        torch.distributed.barrier()
        start = time.perf_counter()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(data),
            model=[stage],
            num_microbatches=MICROBATCHES,
            seq_length=TOKENS,
            micro_batch_size=1,
            forward_only=False,
            **communicator.start_pass(MICROBATCHES, False),
        )
        torch.distributed.barrier()
        stats = communicator.take_stats()
        if step >= 0:
            steps[filled].append(time.perf_counter() - start)
            waits[filled].append((stats.available, stats.filled, stats.overrun, stats.slices))
    durations = fill.runner.durations.expected(DrafterLayer.size)
    gathered: list[Any] | None = [None] * case.stages if rank == 0 else None
    torch.distributed.gather_object((waits, durations), gathered)
    if rank == 0:
        results.put((steps, gathered))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure_case(case: Case) -> dict[str, Any]:
    """One row of the table: medians per step, summed over ranks; `fill` and `cost` are what the ratios are made of."""
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            fork.Process(target=run_rank, args=(rank, case, str(Path(folder) / "store"), results))
            for rank in range(case.stages)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"a rank of {case.name} ended with exit code {process.exitcode}")
    steps, gathered = results.get()
    total = {
        kind: [
            sum(statistics.median(step[column] for step in waits[kind]) for waits, _ in gathered) for column in range(4)
        ]
        for kind in (False, True)
    }
    idle = max(total[False][0], total[True][0])
    pairs = [filled / unfilled for filled, unfilled in zip(steps[True], steps[False], strict=True)]
    return {
        "case": case.name,
        "slice [ms]": 1e3 * statistics.median(duration for _, duration in gathered),
        "slices": int(total[True][3]),
        "idle [ms]": 1e3 * idle,
        "filled [ms]": 1e3 * total[True][1],
        "overrun [ms]": 1e3 * total[True][2],
        "fill": total[True][1] / idle,
        "unfilled step [ms]": 1e3 * statistics.median(steps[False]),
        "filled step [ms]": 1e3 * statistics.median(steps[True]),
        "cost": statistics.median(pairs),
    }


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(__doc__)
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        raise SystemExit("this benchmark needs 2 cores: on one, no rank is ever idle")
    pairs = 10 if arguments.quick else 40
    cases = [Case(2, False, pairs), Case(4, False, pairs), Case(4, True, pairs)]
    rows = {case.name: measure_case(case) for case in cases}
    chosen = {stages: "computed" if stages <= cores else "timed" for stages in (2, 4)}
    ratios = {f"bubble_fill_pp{stages}": rows[f"pp{stages}_{kind}"]["fill"] for stages, kind in chosen.items()}
    ratios["filled_vs_unfilled_step"] = max(rows[f"pp{stages}_{kind}"]["cost"] for stages, kind in chosen.items())
    for name, row in rows.items():
        ratios |= {f"bubble_fill_{name}": row["fill"], f"filled_vs_unfilled_step_{name}": row["cost"]}
    print(f"{cores} cores; the ratios of PP=4 are those of {chosen[4]} stages")
    finish(arguments, ratios, list(rows.values()))


if __name__ == "__main__":
    main()
