"""Tiny random models of every supported family, as Hugging Face folders."""

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 99  # not divisible by 2, so that tensor parallelism pads it
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}


def make_models(root: Path) -> dict[str, Path]:
    """Write one model per family; biases and norms get values that a wrong mapping would show."""
    torch.manual_seed(0)
    models: dict[str, PreTrainedModel] = {
        "qwen3": Qwen3ForCausalLM(Qwen3Config(head_dim=16, tie_word_embeddings=True, **SHAPE)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=False, **SHAPE)),
        "llama": LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE, **SHAPE)),
        "llama-biases": LlamaForCausalLM(LlamaConfig(attention_bias=True, mlp_bias=True, **SHAPE)),
        "llama-attention-bias": LlamaForCausalLM(LlamaConfig(attention_bias=True, **SHAPE)),
        "qwen2-window": Qwen2ForCausalLM(Qwen2Config(**WINDOW, **SHAPE)),
        "qwen3-yarn": Qwen3ForCausalLM(Qwen3Config(head_dim=16, rope_parameters=YARN_ROPE, **SHAPE)),
    }
    for name, model in models.items():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 1.0, 0.3)
        model.save_pretrained(root / name)
    return {name: root / name for name in models}


def make_mixture(folder: Path, **overrides: object) -> Path:
    """Write a Qwen3-MoE model with six experts to a token's two; norms get values that a wrong mapping would show."""
    torch.manual_seed(0)
    options = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    shape = SHAPE | {"head_dim": 16, "tie_word_embeddings": False} | options | overrides
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(folder)
    return folder


def random_sequences(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of uneven lengths."""
    generator = torch.Generator().manual_seed(1)

    def draw(longest: int) -> list[int]:
        length = int(torch.randint(1, longest, (1,), generator=generator))
        return torch.randint(0, VOCAB, (length,), generator=generator).tolist()

    return [draw(20) for _ in range(count)], [draw(40) for _ in range(count)]
