"""The tensors of a Hugging Face model on disk: which files count, and whether they are the whole model and no more."""

import json
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_rl.config import ConfigError
from megatron_rl.config.hub import local_folder
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_mapping import hf_shapes
from megatron_rl.models.quantized_tensors import weight_decoder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MODELOPT = "hf_quant_config.json"
WITHOUT_EFFECT = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of the names of tensors that are computed anew, and may lie in files of older versions of transformers."""
STORED_TYPES = {"F64", "F32", "F16", "BF16"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 8192  # of tied embeddings, compared at a time


def has_hf_weights(folder: str | Path) -> bool:
    """Whether a model (a folder, or a name on the hub) has safetensors; one to train from scratch has none."""
    return any(local_folder(folder).glob("*.safetensors"))


def has_megatron_weights(folder: str | Path) -> bool:
    """Whether a model folder holds weights in Megatron's format."""
    return (local_folder(folder) / "megatron" / "metadata.json").is_file()


def tensor_files(folder: Path, key: str) -> dict[str, Path]:
    """The safetensors file of each tensor of a model.

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
        return {tensor: folder / name for name, header in held.items() for tensor in header}
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
    return dict.fromkeys(_header(files[0]), files[0])


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if not (isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())):
            raise TypeError("weight_map is no map of tensors to files")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{index} is not the index of a model ({type(error).__name__}: {error}).") from None
    return weight_map


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor in a file, without reading the tensors.

    Raises:
        ConfigError: when the file is missing, or is cut short or broken.
    """
    if not file.is_file():
        raise ConfigError(f"{file} is missing; {INDEX} names it, so the model is not whole.")
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
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
        self._files = tensor_files(self._folder, "model.path=")
        self._shapes = hf_shapes(arch)
        self._headers: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in sorted(set(self._files.values())):
            self._headers |= _header(file)
        if (self._folder / MODELOPT).exists():
            raise ConfigError(f"{self._folder / MODELOPT}: weights that ModelOpt quantized are not read; give others.")
        self._decoder = weight_decoder(arch.quantization, f"model.path={str(folder)!r}")
        self._check(arch, str(folder))

    def _check(self, arch: Architecture, path: str) -> None:
        unused = set(self._files)
        for name, shape in self._shapes.items():
            if name not in self._files:
                raise ConfigError(f"model.path={path!r} lacks the tensor {name}; is it the whole model?")
            dtype, stored = self._headers[name]
            if stored != shape:
                raise ConfigError(
                    f"{self._files[name]}: {name} has shape {list(stored)}, but config.json says {list(shape)}."
                )
            unused -= self._parts(name, dtype, shape)
        unused = {name for name in unused if not name.endswith(WITHOUT_EFFECT)}
        if arch.tied and HEAD in unused and EMBEDDING in self._shapes:
            self._check_tied(path)
            unused.discard(HEAD)
        if unused:
            first = min(unused)
            raise ConfigError(
                f"{self._files[first]}: the tensor {first} ({len(unused)} in all) has no place in the model that "
                "config.json describes, so the model would be read in part; use a model that is supported, or remove "
                "the tensor if it means nothing."
            )

    def _parts(self, name: str, dtype: str, shape: tuple[int, ...]) -> set[str]:
        """The stored tensors that make up `name`: itself, and its scales where it is quantized."""
        if self._decoder is None or not self._decoder.decodes(name, dtype):
            if dtype not in STORED_TYPES:
                raise ConfigError(
                    f"{self._files[name]}: {name} is stored as {dtype}, and config.json has no quantization_config "
                    f"that says what it means; give weights in one of {', '.join(sorted(STORED_TYPES))}."
                )
            return {name}
        return self._decoder.parts(name, shape, self._headers, self._files[name])

    def _check_tied(self, path: str) -> None:
        with safe_open(self._files[EMBEDDING], "pt") as one, safe_open(self._files[HEAD], "pt") as two:
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
        if self._decoder is not None and self._decoder.decodes(name, self._headers[name][0]):
            return self._decoded(name)[index]
        with safe_open(self._files[name], "pt") as file:
            part: torch.Tensor = file.get_slice(name)[index]
        return part

    @lru_cache(maxsize=4)  # noqa: B019 - lives as long as the loading; queries, keys and values are read in turns
    def _decoded(self, name: str) -> torch.Tensor:
        assert self._decoder is not None
        return self._decoder.decode(name, self._get)

    def _get(self, name: str) -> torch.Tensor | None:
        if name not in self._files:
            return None
        with safe_open(self._files[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor
