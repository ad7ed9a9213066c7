"""Which part of which Hugging Face tensor each Megatron parameter shard holds.

One description serves loading, resharding into engines, checksums and export: every local parameter is a list of
*blocks*, each saying that `local[local_index] == hf_tensor[hf_index]`. It is a pure function of the architecture and
of the shard's coordinates, so any rank can compute what any other rank holds.

Terms: a *shard* is the part of the model at one (tensor-parallel rank, pipeline stage, expert-parallel rank). Experts
are dealt whole: tensor parallelism does not split them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_rl.models.architecture import Architecture

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Block:
    """`local[local_index]` holds `hf[hf_index]` of the Hugging Face tensor `hf_name`."""

    hf_name: str
    hf_index: Index
    local_index: Index


@dataclass(frozen=True)
class Parameter:
    """One local Megatron parameter (named as in a model with local layers) and what it holds."""

    name: str
    blocks: list[Block]
    replicated: bool
    """Every tensor-parallel rank holds the same values."""
    expert: bool = False
    """Of one expert: the expert-parallel rank decides which, and the tensor-parallel rank has no say."""
    copy: bool = False
    """A second copy of the tied embedding, on the last stage; the first stage's is the one that counts."""


@dataclass(frozen=True)
class Shard:
    """Coordinates of one part of the model."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    ep_rank: int = 0
    ep_size: int = 1


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every tensor of the Hugging Face checkpoint, in model order."""
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    q_rows, kv_rows = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (arch.vocab_size, hidden)}
    for layer in range(arch.layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
            if arch.qkv_bias:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        if arch.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (arch.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (arch.head_dim,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, q_rows)
        if arch.output_bias:
            shapes[prefix + "self_attn.o_proj.bias"] = (hidden,)
        if arch.experts:
            shapes[prefix + "mlp.gate.weight"] = (arch.experts, hidden)
        for mlp in _feed_forwards(arch):
            shapes[f"{prefix}{mlp}.gate_proj.weight"] = (ffn, hidden)
            shapes[f"{prefix}{mlp}.up_proj.weight"] = (ffn, hidden)
            shapes[f"{prefix}{mlp}.down_proj.weight"] = (hidden, ffn)
            if arch.mlp_bias:
                shapes[f"{prefix}{mlp}.gate_proj.bias"] = (ffn,)
                shapes[f"{prefix}{mlp}.up_proj.bias"] = (ffn,)
                shapes[f"{prefix}{mlp}.down_proj.bias"] = (hidden,)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not arch.tied:
        shapes["lm_head.weight"] = (arch.vocab_size, hidden)
    return {arch.family.tensor_name(name): shape for name, shape in shapes.items()}


def parameter_count(arch: Architecture) -> int:
    """Numbers in the whole model."""
    return sum(math.prod(shape) for shape in hf_shapes(arch).values())


def shard_parameters(arch: Architecture, shard: Shard) -> list[Parameter]:
    """The parameters of one shard. Layer numbers in names are local to the stage, as megatron-core counts them."""
    first, last = shard.pp_rank == 0, shard.pp_rank == shard.pp_size - 1
    parameters = []
    if first:
        parameters.append(_vocabulary(arch, shard, "embedding.word_embeddings.weight", "model.embed_tokens.weight"))
    per_stage = arch.layers // shard.pp_size
    for local in range(per_stage):
        parameters += _layer(arch, shard, local, shard.pp_rank * per_stage + local)
    if last:
        parameters.append(_whole("decoder.final_layernorm.weight", "model.norm.weight", 1))
        if not arch.tied:
            parameters.append(_vocabulary(arch, shard, "output_layer.weight", "lm_head.weight"))
        elif not first:
            embedding = _vocabulary(arch, shard, "output_layer.weight", "model.embed_tokens.weight")
            parameters.append(replace(embedding, copy=True))
    return [_renamed(parameter, arch) for parameter in parameters] if arch.family.tensors else parameters


def _renamed(parameter: Parameter, arch: Architecture) -> Parameter:
    named = arch.family.tensor_name
    return replace(parameter, blocks=[replace(block, hf_name=named(block.hf_name)) for block in parameter.blocks])


def _feed_forwards(arch: Architecture) -> list[str]:
    """The gated feed-forward layers of a decoder layer: one, or one per expert."""
    return [f"mlp.experts.{expert}" for expert in range(arch.experts)] if arch.experts else ["mlp"]


def local_shape(
    arch: Architecture, shard: Shard, parameter: Parameter, shapes: dict[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """Shape of a local parameter, vocabulary padding included; `shapes` are those of `hf_shapes`."""
    if parameter.name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return arch.padded_vocab(shard.tp_size) // shard.tp_size, arch.hidden_size
    sizes = []
    for axis in range(len(parameter.blocks[0].local_index)):
        ends = [block.local_index[axis].stop or shapes[block.hf_name][axis] for block in parameter.blocks]
        sizes.append(max(ends))
    return tuple(sizes)


def _layer(arch: Architecture, shard: Shard, local: int, layer: int) -> Iterator[Parameter]:
    name, hf = f"decoder.layers.{local}.", f"model.layers.{layer}."
    yield _whole(name + "input_layernorm.weight", hf + "input_layernorm.weight", 1)
    yield Parameter(
        name + "self_attention.linear_qkv.weight", list(_qkv(arch, shard, hf + "self_attn.{}_proj.weight", 2)), False
    )
    if arch.qkv_bias:
        yield Parameter(
            name + "self_attention.linear_qkv.bias", list(_qkv(arch, shard, hf + "self_attn.{}_proj.bias", 1)), False
        )
    if arch.qk_norm:
        yield _whole(name + "self_attention.q_layernorm.weight", hf + "self_attn.q_norm.weight", 1)
        yield _whole(name + "self_attention.k_layernorm.weight", hf + "self_attn.k_norm.weight", 1)
    heads = arch.heads * arch.head_dim // shard.tp_size
    yield _columns(name + "self_attention.linear_proj.weight", hf + "self_attn.o_proj.weight", heads, shard)
    if arch.output_bias:
        yield _whole(name + "self_attention.linear_proj.bias", hf + "self_attn.o_proj.bias", 1)
    yield _whole(name + "pre_mlp_layernorm.weight", hf + "post_attention_layernorm.weight", 1)
    if not arch.experts:
        yield from _feed_forward(arch, name + "mlp.", hf + "mlp.", shard)
        return
    yield _whole(name + "mlp.router.weight", hf + "mlp.gate.weight", 2)
    held = arch.experts // shard.ep_size
    unsplit = replace(shard, tp_rank=0, tp_size=1)
    for expert in range(held):
        theirs = f"{hf}mlp.experts.{shard.ep_rank * held + expert}."
        for parameter in _feed_forward(arch, f"{name}mlp.experts.local_experts.{expert}.", theirs, unsplit):
            yield replace(parameter, expert=True)


def _feed_forward(arch: Architecture, name: str, hf: str, shard: Shard) -> Iterator[Parameter]:
    ffn = arch.ffn_hidden_size // shard.tp_size
    held = slice(shard.tp_rank * ffn, (shard.tp_rank + 1) * ffn)
    for part, axes in (("weight", 2), ("bias", 1)) if arch.mlp_bias else (("weight", 2),):
        rest = (slice(None),) * (axes - 1)
        halves = [
            Block(f"{hf}{half}_proj.{part}", (held, *rest), (slice(place * ffn, (place + 1) * ffn), *rest))
            for place, half in enumerate(("gate", "up"))
        ]
        yield Parameter(f"{name}linear_fc1.{part}", halves, False)
    yield _columns(name + "linear_fc2.weight", hf + "down_proj.weight", ffn, shard)
    if arch.mlp_bias:
        yield _whole(name + "linear_fc2.bias", hf + "down_proj.bias", 1)


def _qkv(arch: Architecture, shard: Shard, hf_name: str, axes: int) -> Iterator[Block]:
    """Megatron interleaves per key/value group: its query heads, then its key head, then its value head."""
    dim, queries = arch.head_dim, arch.heads // arch.kv_heads
    groups = arch.kv_heads // shard.tp_size
    rest = (slice(None),) * (axes - 1)
    for local in range(groups):
        group = shard.tp_rank * groups + local
        row = local * (queries + 2) * dim
        for part, heads in (("q", queries), ("k", 1), ("v", 1)):
            rows = heads * dim
            held = slice(group * rows, (group + 1) * rows)
            yield Block(hf_name.format(part), (held, *rest), (slice(row, row + rows), *rest))
            row += rows


def _columns(name: str, hf_name: str, columns: int, shard: Shard) -> Parameter:
    held = slice(shard.tp_rank * columns, (shard.tp_rank + 1) * columns)
    return Parameter(name, [Block(hf_name, (slice(None), held), (slice(None), slice(0, columns)))], False)


def _whole(name: str, hf_name: str, axes: int) -> Parameter:
    everything = (slice(None),) * axes
    return Parameter(name, [Block(hf_name, everything, everything)], True)


def _vocabulary(arch: Architecture, shard: Shard, name: str, hf_name: str) -> Parameter:
    rows = arch.padded_vocab(shard.tp_size) // shard.tp_size
    start = min(shard.tp_rank * rows, arch.vocab_size)
    stop = min(start + rows, arch.vocab_size)
    if stop == start:
        return Parameter(name, [], False)
    block = Block(hf_name, (slice(start, stop), slice(None)), (slice(0, stop - start), slice(None)))
    return Parameter(name, [block], False)
