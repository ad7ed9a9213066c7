"""The tensors of a Hugging Face model on disk: which files count, and whether they are the whole model and no more."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_rl.config import ConfigError
from megatron_rl.config.hub import MODEL_PATH, local_folder
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_mapping import hf_shapes
from megatron_rl.models.quantized_tensors import weight_decoder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MODELOPT = "hf_quant_config.json"
WITHOUT_EFFECT = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of the names of tensors that are computed anew, and may lie in files of older versions of transformers."""
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Stored types that are read as they are, by the names of safetensors."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 8192  # of tied embeddings, compared at a time


def has_hf_weights(folder: str | Path) -> bool:
    """Whether a model (a folder, or a name on the hub) has safetensors; one to train from scratch has none."""
    return any(local_folder(folder).glob("*.safetensors"))


def has_megatron_weights(folder: str | Path) -> bool:
    """Whether a model folder holds weights in Megatron's format."""
    return (local_folder(folder) / "megatron" / "metadata.json").is_file()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk, by the header of its file."""

    file: Path
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]


def find_tensors(folder: Path, key: str) -> dict[str, StoredTensor]:
    """The tensors of a model by their names, from the headers of its safetensors; no tensor is read.

    The index decides which files are read, where there is one; else it is `model.safetensors`.

    Args:
        folder: of the model.
        key: what the user has set it with, for messages.

    Raises:
        ConfigError: when there are no weights, a file of the index is missing or lacks a tensor, or cannot be read.
    """
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{key}{str(folder)!r} holds an adapter (adapter_config.json), which is not applied; merge it into the "
            "model and give the merged folder."
        )
    index = folder / INDEX
    if index.is_file():
        weight_map = _read_index(index)
        held = {name: _header(folder / name) for name in sorted(set(weight_map.values()))}
        for tensor, name in weight_map.items():
            if tensor not in held[name]:
                raise ConfigError(f"{folder / name} lacks the tensor {tensor}, which {INDEX} says it has.")
        return {tensor: stored for header in held.values() for tensor, stored in header.items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{key}{str(folder)!r} has no *.safetensors; it must hold the model's weights.")
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif len(files) > 1:
        raise ConfigError(
            f"{key}{str(folder)!r} has {len(files)} *.safetensors but no {INDEX} that says which of them are the "
            "model; add it, or remove the others."
        )
    return _header(files[0])


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if not (isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())):
            raise TypeError("weight_map is no map of tensors to files")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{index} is not the index of a model ({type(error).__name__}: {error}).") from None
    return weight_map


def _header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        ConfigError: when the file is missing, or is cut short or broken.
    """
    if not file.is_file():
        raise ConfigError(f"{file} is missing; {INDEX} names it, so the model is not whole.")
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
            return {
                name: StoredTensor(file, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is not a whole safetensors file ({' '.join(str(error).split())}).") from None


class StoredTensors:
    """The tensors of a model on disk, checked to be exactly those that its `config.json` describes.

    Quantized weights are read as the numbers that they stand for.
    """

    def __init__(self, folder: str | Path, arch: Architecture) -> None:
        """Look at the headers of the files; no tensor is read.

        Args:
            folder: of the model, or its name on the hub.
            arch: what `config.json` describes.

        Raises:
            ConfigError: naming the tensor that is missing, of another shape or type, or has no use, or the file.
        """
        self._folder = local_folder(folder)
        self._stored = find_tensors(self._folder, MODEL_PATH)
        self._stored_shapes = {name: tensor.shape for name, tensor in self._stored.items()}
        self._shapes = hf_shapes(arch)
        if (self._folder / MODELOPT).exists():
            raise ConfigError(f"{self._folder / MODELOPT}: weights that ModelOpt quantized are not read; give others.")
        self._decoder = weight_decoder(arch.quantization, f"model.path={str(folder)!r}")
        self._check(arch, str(folder))

    def _check(self, arch: Architecture, path: str) -> None:
        unused = set(self._stored)
        for name, shape in self._shapes.items():
            if name not in self._stored:
                raise ConfigError(f"model.path={path!r} lacks the tensor {name}; is it the whole model?")
            stored = self._stored[name]
            if stored.shape != shape:
                raise ConfigError(
                    f"{stored.file}: {name} has shape {list(stored.shape)}, but config.json says {list(shape)}."
                )
            unused -= self._parts(name)
        unused = {name for name in unused if not name.endswith(WITHOUT_EFFECT)}
        if arch.tied and HEAD in unused and EMBEDDING in self._shapes:
            self._check_tied(path)
            unused.discard(HEAD)
        if unused:
            first = min(unused)
            raise ConfigError(
                f"{self._stored[first].file}: the tensor {first} ({len(unused)} in all) has no place in the model that "
                "config.json describes, so the model would be read in part; use a model that is supported, or remove "
                "the tensor if it means nothing."
            )

    def _parts(self, name: str) -> set[str]:
        """The stored tensors that make up `name`: itself, and its scales where it is quantized."""
        stored = self._stored[name]
        if self._decoder is None or not self._decoder.decodes(name, stored.dtype):
            if stored.dtype not in FLOATS:
                raise ConfigError(
                    f"{stored.file}: {name} is stored as {stored.dtype}, and config.json has no quantization_config "
                    f"that says what it means; give weights in one of {', '.join(sorted(FLOATS))}."
                )
            return {name}
        return self._decoder.parts(name, self._stored_shapes, stored.file)

    def _check_tied(self, path: str) -> None:
        with safe_open(self._stored[EMBEDDING].file, "pt") as one, safe_open(self._stored[HEAD].file, "pt") as two:
            embedding, head = one.get_slice(EMBEDDING), two.get_slice(HEAD)
            same = embedding.get_shape() == head.get_shape()
            for row in range(0, embedding.get_shape()[0], ROWS):
                same = same and torch.equal(embedding[row : row + ROWS], head[row : row + ROWS])
        if not same:
            raise ConfigError(
                f"model.path={path!r} has tie_word_embeddings=true in its config.json, but an {HEAD} that differs from "
                f"{EMBEDDING}; set tie_word_embeddings to false there to use both, or remove {HEAD}."
            )

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """A part of a tensor: in its stored dtype, or float32 where it is stored quantized.

        Args:
            name: by the family's names.
            index: into the whole tensor.
        """
        if self._decoder is not None and self._decoder.decodes(name, self._stored[name].dtype):
            return self._decoded(name)[index]
        with safe_open(self._stored[name].file, "pt") as file:
            part: torch.Tensor = file.get_slice(name)[index]
        return part

    @lru_cache(maxsize=4)  # noqa: B019 - lives as long as the loading; queries, keys and values are read in turns
    def _decoded(self, name: str) -> torch.Tensor:
        assert self._decoder is not None
        return self._decoder.decode(name, self._get)

    def _get(self, name: str) -> torch.Tensor | None:
        if name not in self._stored:
            return None
        with safe_open(self._stored[name].file, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor
