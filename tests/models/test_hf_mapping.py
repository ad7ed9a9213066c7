"""The mapping between Megatron shards and Hugging Face tensors covers everything exactly once."""

import dataclasses
import itertools

import pytest
import torch

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_mapping import Shard, hf_shapes, local_shape, shard_parameters

BASE = Architecture(
    hidden_size=16,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=4,
    ffn_hidden_size=24,
    vocab_size=13,
    max_positions=64,
    norm_eps=1e-6,
    qkv_bias=True,
    qk_norm=True,
    tied=False,
    rope={"rope_theta": 10000.0, "rope_type": "default"},
    init_std=0.02,
)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (4, 4)])
def test_shards_hold_every_element_once(tied: bool, tp: int, pp: int):
    arch = dataclasses.replace(BASE, tied=tied)
    shapes = hf_shapes(arch)
    counts = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
    for stage in range(pp):
        for rank in range(tp):
            shard = Shard(rank, tp, stage, pp)
            for parameter in shard_parameters(arch, shard):
                local = torch.zeros(local_shape(arch, shard, parameter, shapes), dtype=torch.int64)
                for block in parameter.blocks:
                    assert local[block.local_index].shape == counts[block.hf_name][block.hf_index].shape
                    local[block.local_index] += 1
                    if not parameter.copy and not (parameter.replicated and rank > 0):
                        counts[block.hf_name][block.hf_index] += 1
                assert local.max() <= 1, f"{parameter.name}: blocks overlap"
    for name, count in counts.items():
        assert (count == 1).all(), name


@pytest.mark.parametrize(("tp", "pp", "ep"), [(1, 1, 1), (1, 2, 4), (2, 1, 2), (4, 1, 2)])
def test_experts_are_dealt_whole_and_once(tp: int, pp: int, ep: int):
    arch = dataclasses.replace(BASE, experts=8, experts_per_token=2)
    shapes = hf_shapes(arch)
    names = {name: 0 for name in shapes if ".experts." in name}
    for stage, rank in itertools.product(range(pp), range(ep)):
        for parameter in shard_parameters(arch, Shard(0, tp, stage, pp, rank, ep)):
            if parameter.expert:
                rows = 48 if parameter.name.endswith("fc1.weight") else 16
                columns = 16 if parameter.name.endswith("fc1.weight") else 24
                shard = Shard(0, tp, stage, pp, rank, ep)
                assert local_shape(arch, shard, parameter, shapes) == (rows, columns)
                for block in parameter.blocks:
                    names[block.hf_name] += 1
    assert set(names.values()) == {1}
    assert len(names) == 4 * 8 * 3
    assert shapes["model.layers.3.mlp.gate.weight"] == (8, 16)


def test_tied_embedding_on_the_last_stage_is_a_copy():
    arch = dataclasses.replace(BASE, tied=True)
    last = shard_parameters(arch, Shard(0, 1, 1, 2))
    copies = [parameter.name for parameter in last if parameter.copy]
    assert copies == ["output_layer.weight"]


def test_a_rank_may_hold_padding_only():
    arch = dataclasses.replace(BASE, vocab_size=3)
    assert arch.padded_vocab(4) == 4
    embedding = shard_parameters(arch, Shard(3, 4, 0, 1))[0]
    assert embedding.blocks == []


def test_an_unknown_rope_type_is_refused_by_name():
    arch = dataclasses.replace(BASE, rope={"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0})
    with pytest.raises(ValueError, match="yarn"):
        arch.inverse_frequencies()
