"""`megatron-rl quantize profile`: finds out how a model's layers suffer from int8, and what helps."""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import Linear, Module

from megatron_rl.calibration.profile_file import LayerProfile, check_output, profile_table, write_profile
from megatron_rl.calibration.smoothquant import Settings, from_checkpoint, layer_name, losses, search
from megatron_rl.config import Config, ConfigError
from megatron_rl.config.hub import local_folder
from megatron_rl.config.model_fit import check_layout, read_hf_config
from megatron_rl.data.prompts import load_prompts
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.stored_tensors import StoredTensors, find_tensors, has_hf_weights
from megatron_rl.models.token_ids import load_tokenizer, read_token_ids
from megatron_rl.observability.console import Console
from megatron_rl.observability.terminal import standard_output
from megatron_rl.trainer.rollouts_file import read_rollouts

ROWS = 256
"""Inputs per layer on which errors are measured."""
PLAIN = Settings(None, 1.0, None)
"""Without smoothing and clipping."""
Layers = dict[str, dict[str, Linear]]
"""Projections by their names in the Hugging Face format, by their layers' names in vLLM."""
_NORMS = {"self_attn.qkv_proj": "input_layernorm", "mlp.gate_up_proj": "post_attention_layernorm"}


class Inputs:
    """What one layer gets: the largest value of every input channel, and some of the rows."""

    def __init__(self, rows_per_sequence: int) -> None:
        self._rows_per_sequence = rows_per_sequence
        self._rows: list[Tensor] = []
        self._largest: list[Tensor] = []

    def see(self, module: Module, arguments: tuple[Tensor, ...]) -> None:
        """A hook before the layer's forward pass over one sequence, [1, tokens, in]."""
        rows = arguments[0].detach().flatten(0, -2).float()
        self._largest = [torch.stack([rows.abs().amax(0), *self._largest]).amax(0)]
        positions = torch.linspace(0, len(rows) - 1, min(self._rows_per_sequence, len(rows))).round().long()
        self._rows.append(rows[positions])

    def largest(self) -> Tensor:
        """Of each input channel, [in] float32."""
        return self._largest[0]

    def rows(self) -> Tensor:
        """At most `ROWS` of them, [rows, in] float32."""
        rows = torch.cat(self._rows)
        return rows[torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).round().long()]


@torch.inference_mode()
def profile(config: Config, output: Path, prompts: int, rollouts: Path | None, quantized: Path | None) -> None:
    """Run texts through `model.path` and write a profile of its layers to `output`; prints a table.

    Args:
        config: the experiment.
        output: file to write.
        prompts: texts to run: the first prompts of `data.train`.
        rollouts: file with rollouts, the first of which are run instead.
        quantized: a W8A8 checkpoint in the compressed-tensors format, from which smoothing and clipping are taken;
            None: they are searched.

    Raises:
        ConfigError: when the model, the texts, the checkpoint or the place of the output cannot be used.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    check_output(output)
    uncalibrated = {"rollout": config.rollout.model_copy(update={"quantization_profile": None})}  # it may not exist yet
    check_layout(config.model_copy(update=uncalibrated), read_hf_config(config.model.path, config.model.family))
    if not has_hf_weights(config.model.path):
        raise ConfigError(f"model.path={config.model.path!r} has no *.safetensors; give a folder with them.")
    arch = Architecture.from_folder(config.model.path, config.model.family)
    if arch.quantization:
        raise ConfigError(
            f"model.path={config.model.path!r} is stored quantized; give the model that it was made from."
        )
    StoredTensors(config.model.path, arch)
    texts = _texts(config, prompts, rollouts)
    checkpoint = None if quantized is None else QuantizedCheckpoint(quantized)
    dtype = torch.float32 if config.model.precision == "fp32" else torch.bfloat16
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(local_folder(config.model.path), dtype=dtype)
    layers: Layers = {}
    for name, module in model.model.named_modules(prefix="model"):
        if isinstance(module, Linear):
            layers.setdefault(layer_name(name), {})[name] = module
    console = Console(enabled=True)
    inputs = _run(model, layers, texts, console)

    vectors: dict[str, Tensor] = {}
    found: dict[str, LayerProfile] = {}
    with console.phase("choosing", len(layers)) as phase:
        for name, parts in layers.items():
            weight = torch.cat([part.weight for part in parts.values()]).float()
            rows, largest = inputs[name].rows(), inputs[name].largest()
            kept = checkpoint is not None and not checkpoint.quantizes(list(parts))
            if checkpoint is None:
                settings = search(rows, weight, largest)
            else:
                settings = PLAIN if kept else checkpoint.settings(name, list(parts), weight, model)
            plain, chosen = losses(rows, weight, PLAIN), losses(rows, weight, settings)
            found[name] = LayerProfile(plain, chosen, settings.alpha, settings.clip, kept)
            vectors |= {f"{name}.activation_max": largest, f"{name}.weight_max": weight.abs().amax(0)}
            if settings.smoothing is not None:
                vectors[f"{name}.smoothing"] = settings.smoothing.contiguous()
            phase.advance()
    write_profile(output, found, vectors)
    standard_output().print(profile_table(found))
    console.info(f"{output}: {len(found)} layers, {sum(map(len, texts))} tokens; next: megatron-rl quantize setup")


def _run(model: Any, layers: Layers, texts: list[list[int]], console: Console) -> dict[str, Inputs]:
    inputs = {name: Inputs(-(-ROWS // len(texts))) for name in layers}
    # The parts of a layer get the same input.
    hooks = [next(iter(layers[name].values())).register_forward_pre_hook(inputs[name].see) for name in layers]
    with console.phase("profiling", len(texts)) as phase:
        for text in texts:
            model.model(torch.tensor([text]), use_cache=False)
            phase.advance()
    for hook in hooks:
        hook.remove()
    return inputs


class QuantizedCheckpoint:
    """A model in the compressed-tensors format: int8 weights, with a scale per output channel."""

    def __init__(self, folder: Path) -> None:
        """Find its tensors.

        Raises:
            ConfigError: when it has none, or is quantized in another way.
        """
        self._folder = folder
        self._stored = find_tensors(folder, "--quantized ")
        if not any(name.endswith("_proj.weight_scale") for name in self._stored):
            raise ConfigError(
                f"--quantized {folder} has no weight_scale tensors; give a W8A8 checkpoint as llm-compressor writes it."
            )

    def quantizes(self, parts: list[str]) -> bool:
        """Whether it holds these projections in int8.

        Raises:
            ConfigError: for another format.
        """
        scaled = [f"{part}.weight_scale" in self._stored for part in parts]
        if not any(scaled):
            return False
        for part in parts:
            weight = self._tensor(f"{part}.weight")
            if weight.dtype != torch.int8 or self._tensor(f"{part}.weight_scale").numel() != len(weight):
                raise ConfigError(
                    f"--quantized {self._folder}: {part} is not int8 with a scale per output channel; give a W8A8 "
                    "checkpoint with such weights."
                )
        return True

    def settings(self, layer: str, parts: list[str], weight: Tensor, model: Any) -> Settings:
        """Smoothing and clipping of a layer, by comparison with the unquantized model.

        Args:
            layer: its name in vLLM.
            parts: the names of its projections.
            weight: theirs in one, unquantized, float32 [out, in].
            model: the unquantized model in the Hugging Face format.

        Raises:
            ConfigError: when the checkpoint is of another model.
        """
        levels = torch.cat([self._tensor(f"{part}.weight") for part in parts])
        if levels.shape != weight.shape:
            raise ConfigError(f"--quantized {self._folder} is another model: {layer} has the shape {[*levels.shape]}.")
        scales = torch.cat([self._tensor(f"{part}.weight_scale").flatten() for part in parts])
        block, *place = layer.rsplit(".", 2)
        norm = _NORMS.get(".".join(place))
        norms = None
        if norm is not None:
            norms = (model.get_parameter(f"{block}.{norm}.weight"), self._tensor(f"{block}.{norm}.weight"))
        return from_checkpoint(weight, levels, scales, norms)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._stored:
            raise ConfigError(f"--quantized {self._folder} lacks the tensor {name}; is it the whole model?")
        with safe_open(self._stored[name].file, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _texts(config: Config, prompts: int, rollouts: Path | None) -> list[list[int]]:
    tokenizer = load_tokenizer(config.model.path)
    if rollouts is not None:
        vocab_size = int(read_hf_config(config.model.path, config.model.family)["vocab_size"])
        batch = read_rollouts(rollouts, read_token_ids(config.model.path, tokenizer, vocab_size).limit)
        pairs = zip(batch.prompts, batch.responses, strict=True)
        return [prompt + response for prompt, response in pairs][:prompts]
    data = config.data
    loaded = load_prompts(data.train, data, tokenizer, data.split, heldout=False)
    return [prompt.token_ids for prompt in loaded[:prompts]]
