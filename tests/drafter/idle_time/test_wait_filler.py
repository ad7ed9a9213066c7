"""Filling one blocking operation."""

import contextlib
import threading
import time

import pytest
import torch

from drafter.idle_time.slices import SliceRunner
from drafter.idle_time.wait_filler import CudaFill, ThreadFill


class Nap:
    """Slices of a millisecond that note their thread."""

    size = 1

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def next(self, fits) -> "Nap":
        return self

    def run(self) -> None:
        self.threads.append(threading.current_thread())
        time.sleep(0.001)


def test_slices_run_in_this_thread_until_the_operation_is_done():
    work = Nap()
    fill = ThreadFill(SliceRunner(work))
    where: list[threading.Thread] = []

    def operation() -> str:
        where.append(threading.current_thread())
        time.sleep(0.1)
        return "received"

    for _ in range(2):
        start = time.perf_counter()
        result, end, filled = fill.during(operation, expected=0.1)
        assert result == "received"
        assert start + 0.1 <= end <= time.perf_counter()
        assert filled.seconds(start, end) > 0.03
    assert set(work.threads) == {threading.current_thread()}
    assert where[0] is where[1] is not threading.current_thread()
    fill.close()
    where[0].join(5)
    assert not where[0].is_alive()


def test_an_error_of_the_operation_comes_out_here_and_the_helper_lives_on():
    fill = ThreadFill(SliceRunner(Nap()))

    def lost() -> None:
        time.sleep(0.01)
        raise ConnectionError("peer is gone")

    with pytest.raises(ConnectionError, match="peer is gone"):
        fill.during(lost, expected=1.0)
    assert fill.during(lambda: 5, expected=0.0)[0] == 5


def test_an_error_of_a_slice_comes_out_here():
    class Broken(Nap):
        def run(self) -> None:
            raise FloatingPointError("NaN")

    release = threading.Event()
    with pytest.raises(FloatingPointError):
        ThreadFill(SliceRunner(Broken())).during(lambda: release.wait(10), expected=1.0)
    release.set()


def test_on_cuda_the_operation_keeps_its_place_and_each_slice_is_finished(monkeypatch: pytest.MonkeyPatch):
    """The logic of `CudaFill`, with recorded stand-ins for torch's streams."""
    log: list[tuple[str, object]] = []

    class Stream:
        def __init__(self, name: str = "slices") -> None:
            self.name = name

        def synchronize(self) -> None:
            log.append(("synchronize", self.name))

    @contextlib.contextmanager
    def inside(stream: Stream):
        log.append(("enter", stream.name))
        yield
        log.append(("leave", stream.name))

    monkeypatch.setattr(torch.cuda, "Stream", lambda **options: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("compute"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(log.append(("device", device))))
    fill = CudaFill(SliceRunner(Nap()))
    fill.settle()
    assert log == [("synchronize", "compute")]
    fill.during(lambda: time.sleep(0.05), expected=0.05)
    assert log.index(("device", 3)) < log.index(("enter", "compute"))
    slices = [entry for entry in log[1:] if entry[1] == "slices"]
    assert len(slices) >= 3
    assert slices[:3] == [("enter", "slices"), ("leave", "slices"), ("synchronize", "slices")]
