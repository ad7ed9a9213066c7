"""Tiny random models on disk, with a character tokenizer."""

import json
import string
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

CHARACTERS = string.digits + string.ascii_letters + " +-*/=().,;:!?<>#@$%&[]{}|~^_'\"\n"
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}
SPECIAL = ["<pad>", "<eos>", "<bos>"]


def char_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def make_model(folder: Path, seed: int = 0, spread: float = 0.2, **overrides: object) -> Path:
    """Write a random Qwen3 (or another `model_type` of `FAMILIES`) model to `folder`.

    `spread` is the standard deviation of the weights (larger: less uniform logits); `overrides` are options of the
    model's configuration, and `dtype`.
    """
    tokenizer = char_tokenizer()
    options: dict = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": spread,
        **overrides,
    }
    torch.manual_seed(seed)
    dtype = options.pop("dtype", torch.float32)
    config = FAMILIES[options.pop("model_type", "qwen3")]
    model = AutoModelForCausalLM.from_config(config(**options)).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.data.normal_(0, spread)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plant_outliers(folder: Path, factor: float = 100.0) -> Path:
    """Let two inputs of every linear layer be `factor` times larger, and what they are multiplied with smaller.

    In exact numbers the model stays the same; int8 loses what lies beside the outliers.
    """
    weights = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    head_dim = settings["head_dim"]
    shared = settings["num_attention_heads"] // settings["num_key_value_heads"]
    for layer in range(settings["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        for channel in (5, 17):
            for norm, readers in (
                ("input_layernorm", ("self_attn.q", "self_attn.k", "self_attn.v")),
                ("post_attention_layernorm", ("mlp.gate", "mlp.up")),
            ):
                weights[f"{block}{norm}.weight"][channel] *= factor
                for reader in readers:
                    weights[f"{block}{reader}_proj.weight"][:, channel] /= factor
            weights[f"{block}mlp.up_proj.weight"][channel] *= factor
            weights[f"{block}mlp.down_proj.weight"][:, channel] /= factor
            weights[f"{block}self_attn.v_proj.weight"][channel] *= factor  # of the first key/value head
            columns = [head * head_dim + channel for head in range(shared)]
            weights[f"{block}self_attn.o_proj.weight"][:, columns] /= factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
