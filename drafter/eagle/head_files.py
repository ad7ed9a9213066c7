"""Heads on disk, in the format of public EAGLE checkpoints, which vLLM loads with `method: eagle3` or `eagle`.

A folder has `config.json` (a one-layer Llama configuration; `eagle_config` names the depths that EAGLE-3 reads) and
`model.safetensors`. EAGLE-3 tensors are `fc`, `midlayer.*`, `norm`, `lm_head` and, with a reduced vocabulary, `d2t` and
`t2d`; EAGLE tensors are `fc` and `layers.0.*`. The policy's embedding is never written: vLLM then shares the policy's.
Public folders may hold a copy of it; it is ignored, because the head follows a policy whose embedding changes.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drafter.eagle import rope
from drafter.eagle.head import EagleHead, HeadConfig, default_aux_layers
from drafter.eagle.vocabulary import DraftVocabulary

_ARCHITECTURES = {"eagle3": "LlamaForCausalLMEagle3", "eagle": "EagleLlamaForCausalLM"}
_LAYER = {"eagle3": "midlayer.", "eagle": "layers.0."}
# Variants of the format that compute something other than this head does.
_UNSUPPORTED = {
    **dict.fromkeys(("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias"), False),
    **dict.fromkeys(("mlp_bias", "bias", "qkv_bias", "qk_norm", "use_qk_norm", "sliding_window"), False),
    **{"quantization_config": False, "partial_rotary_factor": 1.0, "logit_scale": 1.0},
}
"""And the value with which they change nothing, beside null."""


def head_tensors(head: EagleHead) -> dict[str, Tensor]:
    """The head's tensors in memory, by their names in a checkpoint: for files, and for updates of engines."""
    layer = _LAYER[head.config.kind]
    return {name.replace("midlayer.", layer): tensor for name, tensor in head.state_dict().items()}


def save_head(head: EagleHead, folder: str | Path) -> None:
    """Write a head; `folder` appears at once, complete.

    The files are written to `<folder>.tmp`, which is renamed. An existing folder is replaced; between two renames it is
    `<folder>.old`.
    """
    folder = Path(folder)
    draft, replaced = (folder.with_name(folder.name + suffix) for suffix in (".tmp", ".old"))
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head_tensors(head).items()}
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    (draft / "config.json").write_text(json.dumps(_to_hf(head), indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(folder, replaced)
    os.rename(draft, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def load_head(folder: str | Path, policy_layers: int | None = None) -> EagleHead:
    """Read a head, ours or a public one, in the dtype of its file.

    Args:
        folder: with `config.json`, and `*.safetensors` or `pytorch_model.bin`.
        policy_layers: layers of the policy; needed for EAGLE-3 folders that do not say which depths they read. Those
            mean vLLM's default.

    Raises:
        ValueError: names the file, and the tensor or the key that is missing, unknown, misshaped or not supported.
    """
    folder = Path(folder)
    config = _read_config(folder / "config.json", policy_layers)
    file, tensors = _read_tensors(folder)
    tensors = {_own_name(name): tensor for name, tensor in tensors.items()}
    head = EagleHead(config, _read_vocabulary(file, config, tensors)).to(_dtype(tensors))
    parameters = dict(head.named_parameters())
    _check(file, config, tensors, parameters)
    head.load_state_dict({name: tensors[name] for name in parameters}, strict=False)
    return head


def _dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    return tensors["fc.weight"].dtype if "fc.weight" in tensors else torch.float32


def _check(file: Path, config: HeadConfig, tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if name not in tensors:
            raise ValueError(f"{file}: the tensor {name!r} is missing; config.json describes a head that has it.")
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{file}: the tensor {name!r} has the shape {list(tensors[name].shape)}, but config.json asks for "
                f"{list(parameter.shape)}."
            )
    if unknown := sorted(name for name in tensors if name not in parameters and not _is_ignored(name, config)):
        raise ValueError(f"{file}: the tensor {unknown[0]!r} belongs to a kind of head that is not supported.")


def _own_name(name: str) -> str:
    name = name.removeprefix("model.")
    return "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def _is_ignored(name: str, config: HeadConfig) -> bool:
    copies = ("embed_tokens.weight", "lm_head.weight") if config.kind == "eagle" else ("embed_tokens.weight",)
    return name in (*copies, "d2t", "t2d") or name.endswith("inv_freq")


def _read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """All tensors of the folder, and a file to name in messages."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    if files:
        return files[0], {name: tensor for file in files for name, tensor in load_file(file).items()}
    file = folder / "pytorch_model.bin"
    if not file.is_file():
        raise ValueError(f"{folder} has neither *.safetensors nor pytorch_model.bin.")
    return file, torch.load(file, map_location="cpu", weights_only=True)


def _read_vocabulary(file: Path, config: HeadConfig, tensors: dict[str, Tensor]) -> DraftVocabulary | None:
    """The vocabulary of `d2t`; `t2d` follows from it."""
    if config.draft_vocab_size == config.vocab_size:
        return None
    if "d2t" not in tensors:
        raise ValueError(f"{file}: the tensor 'd2t' is missing; draft_vocab_size is less than vocab_size.")
    d2t = tensors["d2t"].long()
    if d2t.shape != (config.draft_vocab_size,):
        raise ValueError(
            f"{file}: the tensor 'd2t' has the shape {list(d2t.shape)}, but config.json asks for "
            f"[{config.draft_vocab_size}]."
        )
    token_ids = d2t + torch.arange(len(d2t))
    if token_ids[0] < 0 or token_ids[-1] >= config.vocab_size or (token_ids.diff() <= 0).any():
        raise ValueError(f"{file}: the tensor 'd2t' does not give ascending token ids below {config.vocab_size}.")
    return DraftVocabulary(token_ids, config.vocab_size)


def _to_hf(head: EagleHead) -> dict[str, Any]:
    config = head.config
    scaling = {key: value for key, value in config.rope.items() if key != "rope_theta"}
    hf = {
        "architectures": [_ARCHITECTURES[config.kind]],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_parameters": config.rope,  # transformers 5 reads this, version 4 the next two
        "rope_theta": config.rope["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "torch_dtype": str(head.fc.weight.dtype).removeprefix("torch."),
    }
    if config.kind == "eagle3":
        hf["draft_vocab_size"] = config.draft_vocab_size
        hf["eagle_config"] = {
            "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
            "use_aux_hidden_state": True,
        }
    return hf


def _read_config(file: Path, policy_layers: int | None) -> HeadConfig:
    if not file.is_file():
        raise ValueError(f"{file} does not exist.")
    hf = json.loads(file.read_text())
    eagle_config = hf.get("eagle_config") or {}
    architecture = (hf.get("architectures") or [""])[0]
    kind: Literal["eagle3", "eagle"] = "eagle3" if "Eagle3" in architecture else "eagle"
    if "Llama" not in architecture or hf.get("num_hidden_layers", 1) != 1 or hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{file}: {architecture!r} is no head of one Llama layer; other heads are not supported.")
    stated = {**eagle_config, **hf}
    if active := [key for key, neutral in _UNSUPPORTED.items() if stated.get(key) not in (None, neutral)]:
        raise ValueError(f"{file}: {active[0]} is set; heads with it are not supported.")
    if not eagle_config.get("use_aux_hidden_state", True):
        raise ValueError(f"{file}: use_aux_hidden_state is false; an eagle3 head has to read several depths.")
    if (width := hf.get("target_hidden_size", hf.get("hidden_size"))) != hf.get("hidden_size"):
        raise ValueError(f"{file}: target_hidden_size is {width}; a head has to be as wide as its policy.")
    layers = hf.get("eagle_aux_hidden_state_layer_ids") or eagle_config.get("eagle_aux_hidden_state_layer_ids") or ()
    if kind == "eagle3" and not layers:
        if policy_layers is None:
            raise ValueError(f"{file} does not name eagle_aux_hidden_state_layer_ids; give the policy's layers.")
        layers = default_aux_layers(policy_layers)
    try:
        return HeadConfig(
            kind=kind,
            hidden_size=hf["hidden_size"],
            heads=hf["num_attention_heads"],
            kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            ffn_hidden_size=hf["intermediate_size"],
            vocab_size=hf["vocab_size"],
            draft_vocab_size=(hf.get("draft_vocab_size") if kind == "eagle3" else None) or hf["vocab_size"],
            aux_layers=tuple(layers) if kind == "eagle3" else (),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope=rope.parameters(hf),
            max_positions=hf.get("max_position_embeddings", 2048),
            init_std=hf.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ValueError(f"{file}: the key {error} is missing.") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
