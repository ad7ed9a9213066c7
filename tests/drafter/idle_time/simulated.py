"""The schedules of megatron-core with the filler: threads stand for ranks, channels stand for the network."""

import faulthandler
import queue
import random
import threading
import time

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from drafter.idle_time.pipeline_bubbles import BubbleCommunicator
from drafter.idle_time.slices import SliceRunner
from drafter.idle_time.wait_filler import ThreadFill
from megatron_rl.megatron_patches import cpu_backend

TIMEOUT = 40.0  # of one wait in seconds; a machine that stalls must not look like a deadlock


class Group:
    """A process group of threads."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class Network:
    """Rendezvous channels: a send is over when it was received, as with large tensors over gloo."""

    def __init__(self, size: int, dice: random.Random) -> None:
        self.dice = dice
        self.channels = {
            (rank, way): queue.Queue() for rank in range(size) for way in ("next", "prev")
        }  # by receiver and direction
        self.barrier = threading.Barrier(size)

    def exchange(self, group: Group, send_next, send_prev, recv_prev: bool, recv_next: bool):
        rank, size = group.rank(), group.size()
        time.sleep(self.dice.random() * 2e-4)
        taken = []
        for tensor, peer, way in ((send_next, (rank + 1) % size, "next"), (send_prev, (rank - 1) % size, "prev")):
            if tensor is not None:
                taken.append(threading.Event())
                self.channels[peer, way].put((tensor.detach().clone(), taken[-1]))
        received = []
        for wanted, way in ((recv_prev, "next"), (recv_next, "prev")):
            tensor = None
            if wanted:
                tensor, event = self.channels[rank, way].get(timeout=TIMEOUT)
                tensor.requires_grad_()
                event.set()
            received.append(tensor)
        if not all(event.wait(TIMEOUT) for event in taken):
            raise TimeoutError("a send was never received")
        return *received, None


class Stage(torch.nn.Module):
    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: TransformerConfig, dice: random.Random, vp_stage: int | None) -> None:
        super().__init__()
        self.config, self.dice, self.vp_stage, self.received = config, dice, vp_stage, None
        self.scale = torch.nn.Parameter(torch.ones(1))

    def set_input_tensor(self, tensor) -> None:
        self.received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        time.sleep(self.dice.random() * 3e-4)
        return self.scale * (data if self.received is None else self.received)


class Work:
    """Slices of random length, and now and then none."""

    def __init__(self, dice: random.Random) -> None:
        self.dice, self.done = dice, 0

    def next(self, fits):
        return None if self.dice.random() < 0.05 else self

    @property
    def size(self) -> int:
        return self.dice.choice((1, 100))

    def run(self) -> None:
        self.done += 1
        time.sleep(self.dice.random() * 5e-4)


def simulate(seed: int) -> int:
    """One random schedule; returns the slices that ran. Raises when a rank fails or hangs."""
    dice = random.Random(seed)
    size, chunks = dice.randint(2, 4), dice.choice((1, 1, 2))
    microbatches = dice.randint(1, 5) if chunks == 1 else size * dice.randint(1, 2)
    network, errors, slices = Network(size, dice), [], []
    forward_only, share = dice.random() < 0.3, dice.choice((1.0, 1.0, 0.5, 0.0))

    def rank_main(rank: int) -> None:
        try:
            with cpu_backend._CudaMeansCpu():
                slices.append(run_rank(rank, size, chunks, microbatches, forward_only, share, network))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(1.5 * TIMEOUT)
    if errors or any(thread.is_alive() for thread in threads):
        faulthandler.dump_traceback()
        layout = f"{size} stages, {chunks} chunks, {microbatches} micro-batches, forward only {forward_only}"
        raise RuntimeError(f"schedule {seed} ({layout}) did not complete: {errors}")
    return sum(slices)


def run_rank(rank: int, size: int, chunks: int, microbatches: int, forward_only: bool, share: float, network) -> int:
    virtual = chunks if chunks > 1 else None
    config = TransformerConfig(
        num_layers=size * chunks,
        hidden_size=2,
        num_attention_heads=1,
        use_cpu_initialization=True,
        pipeline_model_parallel_size=size,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_dtype=torch.float32,
    )
    group, work = Group(rank, size), Work(network.dice)
    fill = ThreadFill(SliceRunner(work))
    fill.runner.share = share
    communicator = BubbleCommunicator(group, config, fill)
    communicator.network = network
    communicator._meet = lambda: network.barrier.wait(TIMEOUT)
    config.finalize_model_grads_func = communicator.flushing(lambda *arguments, **options: None)
    communicator.history.start_pass(microbatches, forward_only)
    models = [Stage(config, network.dice, index if virtual else None) for index in range(chunks)]
    one = Group(0, 1)
    run = (
        schedules.forward_backward_pipelining_with_interleaving
        if virtual
        else schedules.forward_backward_pipelining_without_interleaving
    )
    data = [torch.ones(1, 1, 2)] * microbatches
    for _ in range(2):
        run(
            forward_step_func=lambda iterator, model: (model(next(iterator)), lambda out: (out.sum(), {})),
            data_iterator=[iter(data) for _ in models] if virtual else iter(data),
            model=models,
            num_microbatches=microbatches,
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=communicator,
            pg_collection=ProcessGroupCollection(tp=one, cp=one, embd=None, pos_embd=None, pp=group, dp_cp=one),
        )
    fill.close()
    return work.done


def install() -> None:
    """Replace the network in this process."""
    torch.distributed.get_global_rank = lambda group, rank: rank
    torch.distributed.is_initialized = lambda: True  # else megatron-core takes every rank for the only one

    def communicate(self, *, tensor_send_next, tensor_send_prev, recv_prev, recv_next, tensor_shape, **options):
        return self.network.exchange(self.pp_group, tensor_send_next, tensor_send_prev, recv_prev, recv_next)

    P2PCommunicator._communicate = communicate


def main(count: int) -> None:
    """Run `count` random schedules in this process, which is of no use for anything else afterwards."""
    cpu_backend.install()
    install()
    torch.set_num_threads(1)
    start, slices = time.perf_counter(), 0
    for seed in range(count):
        slices += simulate(seed)
    print(f"{count} schedules, {slices} slices, {time.perf_counter() - start:.1f} s")
    assert slices > count
