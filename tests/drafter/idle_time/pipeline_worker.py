"""A small pipeline over gloo: the same passes plain, measured and filled, through megatron-core's own schedules.

pipeline_worker FOLDER JOB [JOB ...]

JOB is WORLD_SIZExCHUNKS, or WORLD_SIZExCHUNKSxDIE_AT_SLICE, or simulateCOUNT. Jobs run one after the other in forked
ranks (so that one import of megatron-core serves all) with CHUNKS model chunks each (more than 1: the interleaved
schedule), and each rank saves what it computed to FOLDER/JOB/rankN.pt. With DIE_AT_SLICE, rank 0 ends without a word in
that slice, and the others write the seconds they lived and their error to rankN.txt. Exit codes go to FOLDER/JOB/codes.
"""

import multiprocessing
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from drafter.idle_time.pipeline_bubbles import BubbleCommunicator
from drafter.idle_time.slices import SliceRunner
from drafter.idle_time.timeline import write_trace
from drafter.idle_time.wait_filler import ThreadFill
from megatron_rl.drafting.step_timeline import gather
from megatron_rl.megatron_patches import cpu_backend
from tests.drafter.idle_time import simulated

HIDDEN = 32


class Chunk(torch.nn.Module):
    """Some layers of the pipeline; its first chunk reads the data, its last one gives the loss."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: TransformerConfig, number: int, vp_stage: int | None) -> None:
        super().__init__()
        self.config, self.vp_stage = config, vp_stage
        torch.manual_seed(number)
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(3)))
        self.received: torch.Tensor | None = None

    def set_input_tensor(self, tensor: list[torch.Tensor | None] | torch.Tensor | None) -> None:
        self.received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layers(data if self.received is None else self.received))


class Work:
    """A source of slices that never ends, and counts; the slices compute gradients of their own."""

    size = 1

    def __init__(self, die_at: int | None) -> None:
        self.done, self.die_at = 0, die_at
        self.weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def next(self, fits) -> "Work":
        return self

    def run(self) -> None:
        assert threading.current_thread() is threading.main_thread()
        torch.tanh(self.weight @ self.weight).sum().backward()
        self.done += 1
        if self.done == self.die_at:
            os._exit(7)


def forward_step(losses, iterator, model):
    output = model(next(iterator))

    def loss_function(output):
        loss = output.square().mean()
        losses.append(loss.item())
        return loss, {"loss": loss.detach()}

    return output, loss_function


def run_pass(chunks, communicator, forward_only):
    """Losses (of the last stage) and gradients of one pass over micro-batches of unequal length."""
    microbatches = 4 if len(chunks) == 1 else 2 * torch.distributed.get_world_size()
    data = [torch.randn(5 + 3 * i, 1, HIDDEN, generator=torch.Generator().manual_seed(i)) for i in range(microbatches)]
    losses: list[float] = []
    for chunk in chunks:
        chunk.zero_grad()
    with torch.set_grad_enabled(not forward_only):
        get_forward_backward_func()(
            forward_step_func=partial(forward_step, losses),
            data_iterator=[iter(data) for _ in chunks] if len(chunks) > 1 else iter(data),
            model=chunks,
            num_microbatches=microbatches,
            seq_length=64,
            micro_batch_size=1,
            forward_only=forward_only,
            **(communicator.start_pass(microbatches, forward_only) if communicator else {}),
        )
    gradients = [parameter.grad for chunk in chunks for parameter in chunk.parameters()]
    return losses, [None if gradient is None else gradient.clone() for gradient in gradients]


def join(rank: int, world_size: int, folder: Path, count: int) -> TransformerConfig:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    cpu_backend.install()
    virtual = count if count > 1 else None
    parallel_state.initialize_model_parallel(1, world_size, virtual)
    return TransformerConfig(
        num_layers=world_size * count,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        use_cpu_initialization=True,
        pipeline_model_parallel_size=world_size,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=False,
    )


def work(rank: int, world_size: int, folder: Path, count: int, die_at: int | None) -> None:
    config = join(rank, world_size, folder, count)
    flushes: list[bool] = []
    config.finalize_model_grads_func = lambda *arguments, **options: flushes.append("pg_collection" in options)
    chunks = [Chunk(config, index * world_size + rank, index if count > 1 else None) for index in range(count)]
    result: dict = {"plain": [run_pass(chunks, None, forward_only) for forward_only in (False, True)]}
    source = Work(die_at if rank == 0 else None)
    group = parallel_state.get_pipeline_model_parallel_group()
    communicator = BubbleCommunicator(group, config, ThreadFill(SliceRunner(source)))
    config.finalize_model_grads_func = communicator.flushing(config.finalize_model_grads_func)
    for name, filling, passes in (("unfilled", False, 1), ("filled", True, 10**6 if die_at else 4)):
        communicator.filling = filling
        for _ in range(passes):
            communicator.timeline.start()
            result[name] = [run_pass(chunks, communicator, forward_only) for forward_only in (False, True)]
        result[name + " stats"] = vars(communicator.take_stats())
    result["flushes"], result["slices"] = flushes, source.done
    ranks = gather(communicator.timeline.stop(), torch.distributed.group.WORLD)
    if rank == 0:
        write_trace(ranks, folder / "trace.json", 4)
    torch.save(result, folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def run_rank(rank: int, folder: Path, world_size: int, count: int, die_at: int | None) -> None:
    start = time.perf_counter()
    try:
        work(rank, world_size, folder, count, die_at)
    except RuntimeError as error:
        (folder / f"rank{rank}.txt").write_text(f"{time.perf_counter() - start:.1f} {error}")
        raise


def main() -> None:
    fork = multiprocessing.get_context("fork")
    for job in sys.argv[2:]:
        folder = Path(sys.argv[1]) / job
        folder.mkdir()
        if job.startswith("simulate"):
            ranks = [fork.Process(target=simulated.main, args=(int(job.removeprefix("simulate")),))]
        else:
            world_size, count, die_at = (*map(int, job.split("x")), None)[:3]
            ranks = [
                fork.Process(target=run_rank, args=(rank, folder, world_size, count, die_at))
                for rank in range(world_size)
            ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        (folder / "codes").write_text(" ".join(str(process.exitcode) for process in ranks))


if __name__ == "__main__":
    main()
