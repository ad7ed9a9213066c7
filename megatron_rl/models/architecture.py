"""What a Hugging Face `config.json` says about a model of one of the families (`megatron_rl.config.families`)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from drafter.eagle import rope
from megatron_rl.config.errors import ConfigError
from megatron_rl.config.families import LLAMA, ModelFamily, find_family
from megatron_rl.config.model_fit import read_hf_config
from megatron_rl.config.model_keys import attention_window


@dataclass(frozen=True)
class Architecture:
    """Shape and variant of a decoder. Sizes are of the whole model, before any split."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    """Of the feed-forward layer, or of each expert."""
    vocab_size: int
    max_positions: int
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    rope: dict[str, Any]
    """`rope_theta`, `rope_type` and the parameters of its scaling, as transformers names them."""
    init_std: float
    output_bias: bool = False
    """The output projection of attention has a bias."""
    mlp_bias: bool = False
    """The linear layers of the feed-forward layer have biases."""
    window: int | None = None
    """How many tokens each position sees, itself among them; None: all before it."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    """How its files hold weights (`quantization_config`); empty: as they are."""
    experts: int = 0
    """Of each layer; 0: the model is dense."""
    experts_per_token: int = 0
    normalize_experts: bool = True
    """The weights of a token's experts add up to 1."""
    family: ModelFamily = LLAMA
    """Here it names the tensors in files; all else that it decides is in the other fields."""

    @classmethod
    def from_folder(cls, path: str | Path, family: str | None = None) -> "Architecture":
        """Read `path/config.json`.

        Args:
            path: a model folder.
            family: `model.family`.

        Raises:
            ConfigError: as `from_hf`, and when the file cannot be read.
        """
        return cls.from_hf(read_hf_config(str(path), family), family)

    @classmethod
    def from_hf(cls, hf: dict[str, Any], family: str | None = None) -> "Architecture":
        """From the content of `config.json`, of transformers 4 or 5.

        Args:
            hf: that content.
            family: `model.family`, None: one of the built-in ones, by the architecture that `hf` names.

        Raises:
            ConfigError: for a model of no family, and positions that are not supported.
        """
        kind = find_family(hf, family)
        hf = kind.standard(hf)
        attention_bias = bool(hf.get("attention_bias"))
        heads = hf["num_attention_heads"]
        try:
            positions = rope.parameters(hf)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the model's config.json: {error}") from None
        return cls(
            hidden_size=hf["hidden_size"],
            layers=hf["num_hidden_layers"],
            heads=heads,
            kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            ffn_hidden_size=hf["moe_intermediate_size" if kind.mixture else "intermediate_size"],
            vocab_size=hf["vocab_size"],
            max_positions=hf.get("max_position_embeddings", 2048),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            qkv_bias=kind.qkv_bias or attention_bias,
            qk_norm=kind.qk_norm,
            tied=bool(hf.get("tie_word_embeddings", False)),
            rope=positions,
            init_std=hf.get("initializer_range", 0.02),
            output_bias=attention_bias,
            mlp_bias=bool(hf.get("mlp_bias")),
            quantization=hf.get("quantization_config") or {},
            window=attention_window(hf, kind, "the model"),
            experts=int(hf["num_experts"]) if kind.mixture else 0,
            experts_per_token=hf["num_experts_per_tok"] if kind.mixture else 0,
            normalize_experts=bool(hf.get("norm_topk_prob", False)),
            family=kind,
        )

    def padded_vocab(self, tp_size: int) -> int:
        """Vocabulary rows after padding to a multiple of `tp_size`."""
        return math.ceil(self.vocab_size / tp_size) * tp_size

    def inverse_frequencies(self) -> Float[torch.Tensor, "half_head_dim"]:
        """RoPE inverse frequencies, float32 [head_dim / 2], in radians per position, with their scaling applied.

        Raises:
            ValueError: for a `rope_type` that is not supported.
        """
        return rope.inverse_frequencies(self.rope, self.head_dim)

    @property
    def softmax_scale(self) -> float:
        """What the products of queries and keys are multiplied by.

        Scaled RoPE multiplies rotated queries and keys by an attention factor; all of a head is rotated, so the factor
        may as well be applied twice to their products.
        """
        return float(rope.attention_factor(self.rope) ** 2 / math.sqrt(self.head_dim))
