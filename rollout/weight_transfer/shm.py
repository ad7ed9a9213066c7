"""vLLM weight transfer backend `shm`: trainer ranks and engines of one node share one segment of memory.

Each trainer rank copies its shards to where they belong in the full Hugging Face tensors, all ranks meet at a barrier,
and the engines load from the same bytes: nothing is gathered, pickled or written to disk. The segment outlives a dead
engine, so a restarted one is brought up to date from it without the trainer's help.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

BACKEND = "shm"
_ALIGNMENT = 64  # bytes; a cache line, and enough for every dtype


class ShardedWeightSource(WeightSource):
    """A vLLM `WeightSource` that can also name the pieces that this rank holds, without communication."""

    @abstractmethod
    def pieces(self) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
        """This rank's shards: (HF name, index into the full HF tensor, shard).

        Over all ranks together each element of each tensor of `metadata()` is yielded exactly once. The shard has the
        shape that the index selects, and any strides.
        """


@dataclass(frozen=True)
class SegmentSlot:
    """Where a Hugging Face tensor lies in the segment, contiguous."""

    name: str
    dtype: str
    """As in `torch.<dtype>`."""
    shape: tuple[int, ...]
    offset: int
    """In bytes."""

    @property
    def nbytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * dtype.itemsize

    def view(self, segment: Tensor) -> Tensor:
        """The tensor as a view of the mapped segment (uint8)."""
        flat = segment[self.offset : self.offset + self.nbytes]
        return flat.view(getattr(torch, self.dtype)).view(self.shape)


def plan_segment(metadata: list[ParamMeta]) -> list[SegmentSlot]:
    """Lay the tensors out one after another. The same on every rank, as it follows from the metadata alone."""
    slots: list[SegmentSlot] = []
    offset = 0
    for meta in metadata:
        slots.append(SegmentSlot(meta.name, str(meta.dtype).removeprefix("torch."), tuple(meta.shape), offset))
        offset += math.ceil(slots[-1].nbytes / _ALIGNMENT) * _ALIGNMENT
    return slots


def segment_bytes(slots: list[SegmentSlot]) -> int:
    """Size of the segment in bytes."""
    return slots[-1].offset + slots[-1].nbytes


def map_segment(name: str, nbytes: int) -> Tensor:
    """Map an existing segment into this process, as uint8; it stays mapped while the tensor lives.

    Mapped as a file, because `SharedMemory` would make this process's resource tracker delete the segment for
    everyone when this process ends (until Python 3.13).
    """
    return torch.from_file(f"/dev/shm/{name}", shared=True, size=nbytes, dtype=torch.uint8)


def create_segment(name: str, nbytes: int) -> SharedMemory:
    """Create a segment, replacing one of that name which a killed run has left behind."""
    with suppress(FileNotFoundError):
        remove_segment(SharedMemory(name))
    return SharedMemory(name, create=True, size=nbytes)


def remove_segment(segment: SharedMemory) -> None:
    """Unmap a segment and delete it for everyone.

    Python's resource tracker, a process of its own, may have been killed. It is told of the segment once more, which
    starts a new one: that one would otherwise be asked to forget what it has never heard of, and print a stack trace.
    """
    segment.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the tracker died
        resource_tracker.register(f"/{segment.name}", "shared_memory")
        segment.unlink()


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """What an engine needs to map the segment."""

    segment: str
    """Its name."""
    slots: list[SegmentSlot]


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """Nothing: an update is the whole segment."""


class ShmWeightTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Engine side: loads the tensors from the segment through vLLM's layerwise reload, in place."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    _segment: Tensor | None = None
    _slots: list[SegmentSlot]

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        self._slots = init_info.slots
        self._segment = map_segment(init_info.segment, segment_bytes(init_info.slots))

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        assert self._segment is not None, "init_weight_transfer_engine comes first"
        segment = self._segment
        self.model.load_weights(self._named_tensors(segment))

    def _named_tensors(self, segment: Tensor) -> Iterator[tuple[str, Tensor]]:
        tensors = {slot.name: slot.view(segment) for slot in self._slots}
        yield from tensors.items()
        # On CPU a tied output layer multiplies with a packed copy of the embedding, which only loading it by its own
        # name refreshes.
        if getattr(self.model_config.hf_config, "tie_word_embeddings", False) and "lm_head.weight" not in tensors:
            yield "lm_head.weight", tensors["model.embed_tokens.weight"]

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self._segment = None


@dataclass
class ShmTrainerInitInfo(TrainerInitInfo):
    """What a trainer rank needs."""

    backend: ClassVar[str] = BACKEND

    segment: str
    """A name that is unused on this node, and the same on every rank."""
    barrier: Callable[[], None] = field(repr=False)
    """Waits for all trainer ranks."""


class ShmTrainerWeightTransferEngine(TrainerWeightTransferEngine[ShmTrainerInitInfo]):
    """Trainer side, one per rank; rank 0 creates and finally deletes the segment, and drives the engines."""

    init_info_cls = ShmTrainerInitInfo

    def __init__(self, info: ShmTrainerInitInfo, client: VLLMWeightSyncClient, source: ShardedWeightSource) -> None:
        super().__init__(client=client, source=source, is_sender=info.is_sender)
        self._info = info
        self._slots = plan_segment(source.metadata())
        nbytes = segment_bytes(self._slots)
        self._owned = create_segment(info.segment, nbytes) if info.is_sender else None
        info.barrier()
        self._segment: Tensor | None = map_segment(info.segment, nbytes)
        self._filled = False

    @classmethod
    def trainer_init(
        cls,
        init_info: ShmTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        if not isinstance(source, ShardedWeightSource):
            raise TypeError("the shm weight transfer needs a ShardedWeightSource")
        engine = cls(init_info, client, source)
        if engine.is_sender:
            engine.introduce(client)
        return engine

    def introduce(self, client: VLLMWeightSyncClient) -> None:
        """Let the client's engines map the segment."""
        client.init_weight_transfer_engine({"segment": self._info.segment, "slots": self._slots})

    def send_weights(self) -> None:
        """Write this rank's shards and let the engines load; called on every rank."""
        assert isinstance(self.source, ShardedWeightSource) and self._segment is not None
        tensors = {slot.name: slot.view(self._segment) for slot in self._slots}
        for name, index, shard in self.source.pieces():
            tensors[name][index].copy_(shard)
        self._info.barrier()
        self._filled = True
        if self.is_sender:
            self._load(self.client)
        # Nobody may write the next weights while an engine still reads these.
        self._info.barrier()

    def resend(self, client: VLLMWeightSyncClient) -> None:
        """Sender only: bring restarted engines up to date from the segment (nothing to do before the first send)."""
        self.introduce(client)
        if self._filled:
            self._load(client)

    def _load(self, client: VLLMWeightSyncClient) -> None:
        client.start_weight_update()
        client.update_weights({})
        client.finish_weight_update()

    def shutdown(self) -> None:
        """Unmap the segment; rank 0 also deletes it."""
        self._segment = None
        if self._owned is not None:
            remove_segment(self._owned)
            self._owned = None


def register_shm_transfer() -> None:
    """Make the backend known to vLLM in this process; safe to call more than once."""
    factories: tuple[tuple[Any, type], ...] = (
        (WeightTransferEngineFactory, ShmWeightTransferEngine),
        (WeightTransferTrainerFactory, ShmTrainerWeightTransferEngine),
    )
    for factory, engine in factories:
        if BACKEND not in factory._registry:
            factory.register_engine(BACKEND, engine)
