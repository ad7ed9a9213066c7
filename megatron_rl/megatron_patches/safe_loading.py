"""Lets torch's distributed checkpoints be read as data: a folder from somewhere must not run code here.

torch pickles the index of a checkpoint (`.metadata`), and reads it and values that are no tensors without restriction.
"""

import io
import pickle
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint import default_planner, filesystem
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.planner import ReadItem

_PARTS = "torch.distributed.checkpoint"
ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (f"{_PARTS}.filesystem", "_StorageInfo"),
    *((f"{_PARTS}.planner", name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    *(
        (f"{_PARTS}.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
"""What an index is made of, beside plain values and the names of dtypes."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index holds {module}.{name}, which no index has, and was not read")


def _load_index(file: io.IOBase) -> Any:
    return _IndexUnpickler(file).load()  # type: ignore[arg-type]


def _load_bytes(self: default_planner.DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    loaded = torch.load(value, weights_only=True)
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)
    else:
        self.state_dict[read_item.dest_index.fqn] = loaded


def install() -> None:
    """From now on in this process. Idempotent."""
    filesystem.pickle = SimpleNamespace(load=_load_index, dump=pickle.dump)  # type: ignore[assignment]
    default_planner.DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]
