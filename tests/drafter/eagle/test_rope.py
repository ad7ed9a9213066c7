"""Rotary positions are those of transformers and of vLLM, for every kind that is supported."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from drafter.eagle import rope
from tests.hf_models import LLAMA3_ROPE

ORIGINAL = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
KINDS = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": LLAMA3_ROPE,
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "yarn, its own turns": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, **ORIGINAL},
    "yarn, not truncated": {"rope_type": "yarn", "factor": 8.0, "truncate": False, **ORIGINAL},
    "yarn, attention factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.9, **ORIGINAL},
    "yarn, mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0, **ORIGINAL},
}


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_and_factor_are_those_of_transformers(kind: str) -> None:
    given = KINDS[kind]
    theirs = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=256, rope_parameters=dict(given)
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[given["rope_type"]](theirs, torch.device("cpu"))
    ours = rope.parameters({"rope_parameters": given, "max_position_embeddings": 256})
    torch.testing.assert_close(rope.inverse_frequencies(ours, 64), frequencies, atol=0, rtol=1e-6)
    assert rope.attention_factor(ours) == pytest.approx(factor)


@pytest.mark.parametrize("kind", KINDS)
def test_rotated_heads_are_those_of_vllm(kind: str) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    given = KINDS[kind]
    with set_current_vllm_config(VllmConfig()):
        theirs = get_rope(64, 256, rope_parameters=dict(given), dtype=torch.float32)
    torch.manual_seed(0)
    query = torch.randn(3, 20, 64)  # [heads, seq, head_dim]
    positions = torch.arange(100, 120)
    flat = query.transpose(0, 1).flatten(1).contiguous()
    expected = theirs.forward_native(positions, flat, flat.clone())[0].unflatten(1, (3, 64)).transpose(0, 1)
    ours = rope.parameters({"rope_parameters": given, "max_position_embeddings": 256})
    found = rope.rotate(query, positions, rope.inverse_frequencies(ours, 64), rope.attention_factor(ours))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_yarn_without_original_positions_takes_the_models() -> None:
    hf = {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1e6, "max_position_embeddings": 512}
    assert rope.parameters(hf)["original_max_position_embeddings"] == 512
