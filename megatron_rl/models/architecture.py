"""What a Hugging Face `config.json` says about a Llama, Qwen2, Qwen3 or Qwen3-MoE model."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from megatron_rl.config.model_fit import MIXTURE, expert_count


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
    experts: int = 0
    """Of each layer; 0: the model is dense."""
    experts_per_token: int = 0
    normalize_experts: bool = True
    """The weights of a token's experts add up to 1."""

    @classmethod
    def from_folder(cls, path: str | Path) -> "Architecture":
        """Read `path/config.json`."""
        return cls.from_hf(json.loads((Path(path) / "config.json").read_text()))

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "Architecture":
        """From the content of `config.json`, of transformers 4 or 5."""
        family = hf["architectures"][0]
        mixture = family == MIXTURE
        heads = hf["num_attention_heads"]
        rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        rope.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
        rope.setdefault("rope_type", rope.pop("type", "default"))
        return cls(
            hidden_size=hf["hidden_size"],
            layers=hf["num_hidden_layers"],
            heads=heads,
            kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            ffn_hidden_size=hf["moe_intermediate_size" if mixture else "intermediate_size"],
            vocab_size=hf["vocab_size"],
            max_positions=hf.get("max_position_embeddings", 2048),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            qkv_bias=family == "Qwen2ForCausalLM" or bool(hf.get("attention_bias", False)),
            qk_norm=family in ("Qwen3ForCausalLM", MIXTURE),
            tied=bool(hf.get("tie_word_embeddings", False)),
            rope=rope,
            init_std=hf.get("initializer_range", 0.02),
            experts=expert_count(hf) if mixture else 0,
            experts_per_token=hf["num_experts_per_tok"] if mixture else 0,
            normalize_experts=bool(hf.get("norm_topk_prob", False)),
        )

    def padded_vocab(self, tp_size: int) -> int:
        """Vocabulary rows after padding to a multiple of `tp_size`."""
        return math.ceil(self.vocab_size / tp_size) * tp_size

    def inverse_frequencies(self) -> Float[torch.Tensor, "half_head_dim"]:
        """RoPE inverse frequencies, float32 [head_dim / 2], with llama3 or linear scaling applied.

        Source: RoFormer (arXiv 2104.09864); the llama3 rule is that of the Llama 3.1 model release.

        Raises:
            ValueError: for a `rope_type` other than default, linear and llama3.
        """
        rope = self.rope
        exponent: torch.Tensor = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        frequencies: torch.Tensor = 1.0 / (rope["rope_theta"] ** exponent)
        kind = rope["rope_type"]
        if kind == "default":
            return frequencies
        if kind == "linear":
            return frequencies / float(rope["factor"])
        if kind != "llama3":
            raise ValueError(f"rope_type {kind!r} is not supported; supported are default, linear and llama3.")
        # Long wavelengths are stretched by `factor`, short ones kept, and those between interpolated.
        wavelength = 2 * math.pi / frequencies
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
        smooth = smooth.clamp(0, 1)
        scaled: torch.Tensor = frequencies * (smooth + (1 - smooth) / rope["factor"])
        return scaled
