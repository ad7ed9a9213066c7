"""SIGTERM is noted, and all ranks agree on it."""

import os
import signal

import pytest
import torch

from megatron_rl.distributed.preemption import StopRequest
from megatron_rl.distributed.runtime import Runtime


@pytest.fixture
def runtime():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Runtime(0, 1, torch.device("cpu"), torch.distributed.group.WORLD)
    torch.distributed.destroy_process_group()


def test_sigterm_is_noted_and_the_handler_is_put_back(runtime: Runtime) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest(runtime)
    assert not stop.agreed()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.agreed()
    stop.close()
    assert signal.getsignal(signal.SIGTERM) == before
