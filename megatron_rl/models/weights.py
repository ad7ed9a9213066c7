"""Weights between Hugging Face checkpoints, Megatron shards and engines."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from safetensors.torch import save_file

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_mapping import Block, Parameter, Shard, hf_shapes, local_shape, shard_parameters
from megatron_rl.models.model_folder import new_model_folder
from megatron_rl.models.stored_tensors import StoredTensors

EXPORT_SHARD_BYTES = 4 * 2**30
# With Transformer Engine the norms before a linear layer are part of it.
TRANSFORMER_ENGINE_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# And its grouped products keep the experts of a layer in one module.
GROUPED_EXPERT = re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$")


def current_shard() -> Shard:
    """This rank's coordinates."""
    return Shard(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_world_size(),
    )


def _live_parameters(model: GPTModel) -> dict[str, torch.Tensor]:
    live = dict(model.named_parameters())
    for ours, theirs in TRANSFORMER_ENGINE_NAMES.items():
        for name in [name for name in live if name.endswith(theirs)]:
            live[name.removesuffix(theirs) + ours] = live.pop(name)
    for name in [name for name in live if GROUPED_EXPERT.search(name)]:
        live[GROUPED_EXPERT.sub(r".experts.local_experts.\2.\1.weight", name)] = live.pop(name)
    return live


Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all) of this rank."""


@torch.no_grad()
def load_hf_weights(model: GPTModel, arch: Architecture, folder: str | Path, progress: Progress) -> None:
    """Stream this rank's part of the safetensors in `folder` into `model`, tensor slice by tensor slice.

    Args:
        model: this rank's part.
        arch: shape of the whole.
        folder: a Hugging Face model.
        progress: called after every tensor of `model`.

    Raises:
        ConfigError: when the files are not exactly the model; see `StoredTensors`.
    """
    stored = StoredTensors(folder, arch)
    live = _live_parameters(model)
    parameters = shard_parameters(arch, current_shard())
    for done, parameter in enumerate(parameters, 1):
        target = live[parameter.name]
        for block in parameter.blocks:
            target[block.local_index] = stored.read(block.hf_name, block.hf_index).to(target.device, target.dtype)
        if parameter.name.endswith(("word_embeddings.weight", "output_layer.weight")):
            used = sum(block.local_index[0].stop for block in parameter.blocks)
            target[used:] = 0
        progress(done, len(parameters))


@torch.no_grad()
def draw_weights(model: GPTModel, arch: Architecture, seed: int) -> None:
    """Random weights for a new model, the same in every parallel layout.

    Normal with the architecture's `init_std`, smaller by sqrt(2 layers) where a layer adds to the residual stream
    (GPT-2); norms are 1 and biases 0.
    """
    live = _live_parameters(model)
    shapes = hf_shapes(arch)
    for parameter in shard_parameters(arch, current_shard()):
        target = live[parameter.name].zero_()
        for block in parameter.blocks:
            name, shape = block.hf_name, shapes[block.hf_name]
            if len(shape) == 1:
                target[block.local_index] = float(parameter.name.endswith("norm.weight"))
                continue
            residual = ".linear_proj." in parameter.name or ".linear_fc2." in parameter.name
            std = arch.init_std / math.sqrt(2 * arch.layers) if residual else arch.init_std
            key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
            full = torch.randn(shape, generator=generator) * std
            target[block.local_index] = full[block.hf_index].to(target.device, target.dtype)


@dataclass(frozen=True)
class TensorMeta:
    """A tensor of the Hugging Face checkpoint: name, dtype as sent, full shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class PolicyWeights:
    """The policy's weights under Hugging Face names.

    `pieces` gives what this rank holds, without communication; iteration gives full tensors, by collectives that all
    ranks run in lockstep.
    """

    def __init__(self, model: GPTModel, arch: Architecture) -> None:
        self.arch = arch
        self.shard = current_shard()
        self.live = _live_parameters(model)
        self.dtype = model.config.params_dtype
        self.shapes = hf_shapes(arch)
        self.first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        self.first_copy_of_experts = parallel_state.get_expert_data_parallel_rank() == 0

    def metadata(self) -> list[TensorMeta]:
        """Name, dtype and full shape of every tensor, in the order of iteration."""
        names: dict[str, None] = {}
        for _, _, shards in self._parameters():
            names |= dict.fromkeys(block.hf_name for blocks in shards for block in blocks)
        return [TensorMeta(name, self.dtype, self.shapes[name]) for name in names]

    def pieces(self) -> Iterator[tuple[str, tuple[slice, ...], torch.Tensor]]:
        """(HF name, index into the full tensor, values) for all that this rank contributes.

        Over all ranks every element of every tensor is given exactly once.
        """
        for parameter in shard_parameters(self.arch, self.shard):
            if parameter.copy or not (self.first_copy_of_experts if parameter.expert else self.first_replica):
                continue
            if parameter.replicated and self.shard.tp_rank > 0:
                continue
            local = self.live[parameter.name].detach()
            for block in parameter.blocks:
                yield block.hf_name, block.hf_index, local[block.local_index]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.full(set(self.shapes))

    def full(self, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The full tensors of the parameters that hold any of `names`; a collective operation of all ranks."""
        for stage, parameter, shards in self._parameters():
            if any(block.hf_name in names for blocks in shards for block in blocks):
                yield from self._assemble(stage, parameter, shards)

    def _parameters(self) -> Iterator[tuple[int, Parameter, list[list[Block]]]]:
        """(stage, one of this rank's parameters there, the blocks of each shard that makes it whole)."""
        for stage in range(self.shard.pp_size):
            mine = replace(self.shard, pp_rank=stage)
            by_tp = [shard_parameters(self.arch, replace(mine, tp_rank=rank)) for rank in range(mine.tp_size)]
            by_ep = [shard_parameters(self.arch, replace(mine, ep_rank=rank)) for rank in range(mine.ep_size)]
            for place, parameter in enumerate(shard_parameters(self.arch, mine)):
                if not parameter.copy:
                    peers = by_ep if parameter.expert else by_tp
                    yield stage, parameter, [peer[place].blocks for peer in peers]

    def _assemble(
        self, stage: int, parameter: Parameter, blocks_of: list[list[Block]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        shards = self._collect(stage, parameter)
        full: dict[str, torch.Tensor] = {}
        for shard, blocks in zip(shards, blocks_of, strict=True):
            for block in blocks:
                if block.hf_name not in full:
                    full[block.hf_name] = shard.new_empty(self.shapes[block.hf_name])
                full[block.hf_name][block.hf_index] = shard[block.local_index]
        yield from full.items()

    def _collect(self, stage: int, parameter: Parameter) -> list[torch.Tensor]:
        """The parameter's shards by tensor-parallel rank, an expert's by expert-parallel rank, on every rank."""
        if stage == self.shard.pp_rank:
            local = self.live[parameter.name].detach().contiguous()
        else:
            any_live = next(iter(self.live.values()))
            shape = local_shape(self.arch, replace(self.shard, pp_rank=stage), parameter, self.shapes)
            local = any_live.new_empty(shape)
        if self.shard.pp_size > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(local, torch.distributed.get_global_rank(group, stage), group=group)
        if parameter.expert:
            group = parallel_state.get_expert_model_parallel_group()
        else:
            group = parallel_state.get_tensor_model_parallel_group()
        if group.size() == 1:
            return [local]
        shards = [torch.empty_like(local) for _ in range(group.size())]
        torch.distributed.all_gather(shards, local, group=group)
        return shards


def export_hf(
    source: PolicyWeights, template: str | Path, folder: Path, progress: Progress = lambda done, total: None
) -> None:
    """Write a Hugging Face model. Called on every rank; rank 0 writes. The folder appears at once, complete.

    Args:
        source: the weights.
        template: folder of the model that everything else is copied from.
        folder: to write.
        progress: called on rank 0 after every tensor.
    """
    with new_model_folder(folder, template, source.dtype) as draft:
        if torch.distributed.get_rank() == 0:
            _write_tensors(source, draft, progress)
        else:
            for _ in source:  # iteration is collective
                pass


def _write_tensors(source: PolicyWeights, folder: Path, progress: Progress) -> None:
    pending: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    total, size, number = len(source.metadata()), 0, 0

    def flush() -> None:
        nonlocal number, size
        number += 1
        name = f"model-{number:05d}.safetensors"
        save_file(pending, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(pending, name))
        pending.clear()
        size = 0

    for done, (name, tensor) in enumerate(source, 1):
        pending[name] = tensor.cpu().clone()
        size += tensor.nbytes
        if size >= EXPORT_SHARD_BYTES:
            flush()
        progress(done, total)
    if pending:
        flush()
    _finish_export(folder, index)


def _finish_export(draft: Path, index: dict[str, str]) -> None:
    if len(set(index.values())) == 1:
        (draft / "model-00001.safetensors").rename(draft / "model.safetensors")
        return
    total = sum(path.stat().st_size for path in draft.glob("*.safetensors"))
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (draft / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))
