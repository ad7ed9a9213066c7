"""Model families: how Llama-like decoders differ, one entry for each. Importable without torch.

All families here are decoders of one kind: RMS norms before attention and before a gated SiLU feed-forward layer (or a
mixture of such layers), grouped queries and rotary positions. An entry says what differs between them. `config.json`
and the tensors of a layer go by the names of Llama, and of Qwen3-MoE where there are experts; an entry names those that
are called otherwise.

Another family of this kind is one more entry of `FAMILIES`. Without touching this package it is a `ModelFamily` in a
module of the user's, which an experiment names by its import path (`examples/model_family` is one):

    model: {path: mistralai/Mixtral-8x7B-v0.1, family: my_package.families:MIXTRAL}

vLLM has to know the architecture, too: the engines load the same `config.json`, and get the trainer's weights under the
tensors' names in files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.import_path import import_object

if TYPE_CHECKING:
    from megatron_rl.config.sections import ScratchModelConfig


@dataclass(frozen=True)
class ModelFamily:
    """What makes a family of models."""

    architecture: str
    """Its name in `architectures` of `config.json`."""
    model_type: str | None = None
    """What `model_type` of `config.json` must be, by which transformers chooses the class; None: not checked."""
    qkv_bias: bool = False
    """Queries, keys and values have a bias."""
    qk_norm: bool = False
    """Each head's queries and keys are normed (RMS, one weight per element of a head)."""
    mixture: bool = False
    """Every layer has a router and experts in place of one feed-forward layer."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Key of `config.json` by Llama's and Qwen3-MoE's name -> the name that this family uses, where it has not both."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values, by the same names, of keys that its `config.json` leaves out."""
    neutral: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of its `config.json`, and the only value of each that is computed here."""
    biases: frozenset[str] = frozenset()
    """Which of `attention_bias` (queries, keys, values and output) and `mlp_bias` (the whole feed-forward layer) its
    `config.json` may switch on."""
    free_head_dim: bool = True
    """`head_dim` may differ from hidden_size / num_attention_heads (in vLLM, too)."""
    window: Literal["none", "optional", "always"] = "none"
    """Whether `sliding_window` limits what a position sees: never, where `use_sliding_window` says so, or always."""
    layered_window: bool = False
    """`max_window_layers` or `layer_types` say in which layers it does."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Replacements in the names of a layer's tensors: part of Llama's or Qwen3-MoE's name -> this family's part."""

    def standard(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The content of `config.json` with all that is read here under Llama's and Qwen3-MoE's names."""
        stated = {ours: hf[theirs] for ours, theirs in self.keys.items() if theirs in hf} | dict(hf)
        # Null is a statement, too, and not the default.
        if "sliding_window" in stated and stated["sliding_window"] is None:
            stated["sliding_window"] = 0  # no window
        heads = stated.get("num_attention_heads")
        if "num_key_value_heads" in stated and stated["num_key_value_heads"] is None:
            stated["num_key_value_heads"] = heads
        if "head_dim" in stated and stated["head_dim"] is None and heads and stated.get("hidden_size"):
            stated["head_dim"] = stated["hidden_size"] // heads
        return {key: value for key, value in {**self.defaults, **stated}.items() if value is not None}

    def tensor_name(self, name: str) -> str:
        """The name in this family's files of a tensor that goes by Llama's or Qwen3-MoE's `name`."""
        if name.startswith("model.layers."):
            for ours, theirs in self.tensors.items():
                name = name.replace(ours, theirs)
        return name


LLAMA = ModelFamily("LlamaForCausalLM", "llama", biases=frozenset({"attention_bias", "mlp_bias"}))
QWEN2 = ModelFamily(
    "Qwen2ForCausalLM",
    "qwen2",
    qkv_bias=True,
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    neutral={"qkv_bias": True},
    free_head_dim=False,
    window="optional",
    layered_window=True,
)
QWEN3 = ModelFamily(
    "Qwen3ForCausalLM",
    "qwen3",
    qk_norm=True,
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    window="optional",
    layered_window=True,
)
QWEN3_MOE = ModelFamily(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    qk_norm=True,
    mixture=True,
    keys={"num_experts": "num_local_experts"},  # as transformers 5 writes it
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
    },
    window="optional",
)
FAMILIES = {family.architecture: family for family in (LLAMA, QWEN2, QWEN3, QWEN3_MOE)}
"""The families that need no `model.family`, by architecture."""


def find_family(hf: Mapping[str, Any], named: str | None = None, path: str | None = None) -> ModelFamily:
    """The family of a model.

    Args:
        hf: content of its `config.json`.
        named: `model.family`, None: one of `FAMILIES`, by the architecture.
        path: `model.path`, for messages, where it is known.

    Raises:
        ConfigError: when `named` is no family or another one, or the architecture is in none.
    """
    model = "the model" if path is None else f"model.path={path!r}"
    named_there = hf.get("architectures")
    if not (isinstance(named_there, list) and named_there and isinstance(named_there[0], str)):
        raise ConfigError(f"{model}: config.json names no architectures; it must be a Hugging Face model's.")
    architecture = named_there[0]
    if named is not None:
        family = _users_family(named)
        if family.architecture != architecture:
            raise ConfigError(
                f"model.family={named} is for {family.architecture}, but {model} is a {architecture}; "
                "name another family or leave the key out."
            )
        return family
    if architecture not in FAMILIES:
        raise ConfigError(
            f"{model} is a {architecture}; supported are {', '.join(FAMILIES)}, and others of their kind "
            "that model.family describes."
        )
    return FAMILIES[architecture]


def _users_family(named: str) -> ModelFamily:
    module_name, _, name = named.partition(":")
    try:
        found = import_object(named)
    except ValueError as error:
        raise ConfigError(f"model.family={named}: {error}.") from error
    if not isinstance(found, ModelFamily):
        raise ConfigError(
            f"model.family={named}: {module_name} has no {name} that is a megatron_rl.config.families.ModelFamily."
        )
    return found


def scratch_config(scratch: "ScratchModelConfig") -> dict[str, Any]:
    """`config.json` of a model that is yet to be made, without what depends on its tokenizer."""
    return {
        "architectures": [QWEN3.architecture],
        "model_type": "qwen3",
        "dtype": "float32",
        "hidden_size": scratch.hidden_size,
        "num_hidden_layers": scratch.layers,
        "num_attention_heads": scratch.heads,
        "num_key_value_heads": scratch.kv_heads,
        "head_dim": scratch.head_dim,
        "intermediate_size": scratch.ffn_hidden_size,
        "max_position_embeddings": scratch.max_positions,
        "tie_word_embeddings": scratch.tie_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        # The published 0.02 suits widths of thousands; narrow models learn far slower from it.
        "initializer_range": round(scratch.hidden_size**-0.5, 4),
        "use_cache": True,
    }
