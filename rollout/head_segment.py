"""The newest weights of the EAGLE head in shared memory, from where engines load them, restarted ones too."""

from collections.abc import Mapping
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta

from rollout.shm_transfer import TensorPlace, create_segment, map_segment, plan_segment, segment_bytes


class HeadSegment:
    """One segment, replaced at every push: no engine keeps it mapped once it has loaded the weights."""

    def __init__(self, name: str, folder: str) -> None:
        """`name` is free on this node; `folder` holds the head that the engines started with."""
        self._name, self._folder = name, Path(folder)
        self._owned: SharedMemory | None = None
        self._arguments: tuple[str, list[TensorPlace], int] | None = None

    @property
    def arguments(self) -> tuple[str, list[TensorPlace], int] | None:
        """Arguments of `RolloutEngine.update_drafter` for the newest weights; None before the first ones."""
        return self._arguments

    def write(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Copy the tensors (CPU, any dtype: engines convert) to a new segment.

        Raises ValueError when names or shapes are not those of the head that the engines started with.
        """
        self._check(tensors)
        places = plan_segment([ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
        self.close()
        self._owned = create_segment(self._name, segment_bytes(places))
        mapped = map_segment(self._name, segment_bytes(places))
        for place in places:
            place.view(mapped).copy_(tensors[place.name].detach())
        self._arguments = self._name, places, version

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        expected: dict[str, list[int]] = {}
        for file in self._folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                expected |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        given = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if expected and (wrong := sorted(n for n in expected | given if expected.get(n) != given.get(n))):
            name = wrong[0]
            raise ValueError(
                f"{len(wrong)} tensors are not those of the head in {self._folder}; the first is {name}: "
                f"{given.get(name, 'missing')} instead of {expected.get(name, 'nothing')}."
            )

    def close(self) -> None:
        """Delete the segment."""
        if self._owned is not None:
            self._owned.close()
            self._owned.unlink()
            self._owned = None
