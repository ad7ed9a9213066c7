"""New weights of the EAGLE head as one object for Ray's object store, which takes them to engines on any node."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

PackedHead = dict[str, tuple[torch.dtype, np.ndarray]]
"""Name -> (dtype, the tensor's bytes as uint8: the last dimension is longer by the item size)."""


def pack_head(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> PackedHead:
    """Pack tensors as arrays that Ray copies once and maps where they are read.

    They are packed as bytes, because numpy has no bfloat16; torch's own pickling takes several copies.

    Args:
        tensors: on CPU.
        dtype: what floating-point tensors are converted to.
    """
    packed: PackedHead = {}
    for name, tensor in tensors.items():
        sent = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        packed[name] = sent.dtype, sent.view(torch.uint8).numpy()
    return packed


def unpack_head(packed: PackedHead) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for each; the tensors are read-only, they may be memory of the object store."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(values).view(dtype) for name, (dtype, values) in packed.items()}
    yield from tensors.items()


def check_head(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Compare names and shapes with those of the head in `folder`, if it has *.safetensors.

    Raises:
        ValueError: they differ; the message names the first tensor that does.
    """
    expected: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            expected |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    given = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if expected and (wrong := sorted(n for n in expected | given if expected.get(n) != given.get(n))):
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} tensors are not those of the head in {folder}; the first is {name}: "
            f"{given.get(name, 'missing')} instead of {expected.get(name, 'nothing')}."
        )


def largest_head(folder: Path) -> int:
    """Most bytes that the head in `folder` takes when packed: its files may hold 16 bits, engines may need 32."""
    return 2 * sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
