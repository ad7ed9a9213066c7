"""`megatron-rl quantize`: `profile` finds out how a model's layers suffer from int8, `setup` writes what engines read.

A profile is one safetensors file: per layer the largest activation and weight of each input channel and the smoothing
vector, and in its header what was measured and chosen.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console as Terminal
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Linear, Module

from megatron_rl.calibration import Losses, Settings, from_checkpoint, layer_name, losses, search
from megatron_rl.config import Config, ConfigError
from megatron_rl.config.layout import check_layout, read_hf_config
from megatron_rl.config.quantization import LayerSettings, QuantizationFile
from megatron_rl.console import Console
from megatron_rl.data.prompts import load_prompts
from megatron_rl.models.weights import has_hf_weights, tensor_files
from megatron_rl.start import load_tokenizer
from megatron_rl.warmup import read_rollouts

ROWS = 256  # inputs per layer on which errors are measured
_NORMS = {"self_attn.qkv_proj": "input_layernorm", "mlp.gate_up_proj": "post_attention_layernorm"}
_KEPT = "the quantized checkpoint keeps it in high precision"


@dataclass(frozen=True)
class LayerProfile:
    """What was measured of a layer, and chosen for it."""

    plain: Losses
    """In int8 without smoothing and clipping."""
    chosen: Losses
    alpha: float | None
    clip: float
    kept: bool
    """The quantized checkpoint that was compared with does not quantize this layer."""


class Inputs:
    """What one layer gets: the largest value of every input channel, and some of the rows."""

    def __init__(self, rows_per_sequence: int) -> None:
        self._rows_per_sequence = rows_per_sequence
        self._rows: list[Tensor] = []
        self.largest: Tensor | None = None  # [in] float32

    def see(self, module: Module, arguments: tuple[Tensor, ...]) -> None:
        """A hook before the layer's forward pass over one sequence, [1, tokens, in]."""
        rows = arguments[0].detach().flatten(0, -2).float()
        largest = rows.abs().amax(0)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        places = torch.linspace(0, len(rows) - 1, min(self._rows_per_sequence, len(rows))).round().long()
        self._rows.append(rows[places])

    def rows(self) -> Tensor:
        """At most `ROWS` of them, [rows, in] float32."""
        rows = torch.cat(self._rows)
        return rows[torch.linspace(0, len(rows) - 1, min(ROWS, len(rows))).round().long()]


@torch.inference_mode()
def profile(config: Config, output: Path, prompts: int, rollouts: Path | None, quantized: Path | None) -> None:
    """Run texts through `model.path` and write a profile of its layers to `output`; prints a table.

    The texts are the first `prompts` prompts of `data.train`, or whole rollouts from a file. Smoothing and clipping are
    searched, or taken from `quantized`, a W8A8 checkpoint in the compressed-tensors format.

    Raises:
        ConfigError: when the model, the texts or the checkpoint cannot be used.
    """
    from transformers import AutoModelForCausalLM

    uncalibrated = {"rollout": config.rollout.model_copy(update={"quantization_profile": None})}  # it may not exist yet
    check_layout(config.model_copy(update=uncalibrated), read_hf_config(config.model.path))
    if not has_hf_weights(config.model.path):
        raise ConfigError(f"model.path={config.model.path!r} has no *.safetensors; give a folder with them.")
    texts = _texts(config, prompts, rollouts)
    checkpoint = None if quantized is None else QuantizedCheckpoint(quantized)
    dtype = torch.float32 if config.model.precision == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype)
    layers: dict[str, list[tuple[str, Linear]]] = {}
    for name, module in model.model.named_modules(prefix="model"):
        if isinstance(module, Linear):
            layers.setdefault(layer_name(name), []).append((name, module))
    inputs = {name: Inputs(-(-ROWS // len(texts))) for name in layers}
    hooks = [parts[0][1].register_forward_pre_hook(inputs[name].see) for name, parts in layers.items()]
    console = Console(enabled=True)
    with console.phase("profiling", len(texts)) as phase:
        for text in texts:
            model.model(torch.tensor([text]), use_cache=False)
            phase.advance()
    for hook in hooks:
        hook.remove()

    vectors: dict[str, Tensor] = {}
    found: dict[str, LayerProfile] = {}
    with console.phase("choosing", len(layers)) as phase:
        for name, parts in layers.items():
            weight = torch.cat([part.weight for _, part in parts]).float()
            seen = inputs[name]
            assert seen.largest is not None
            vectors[f"{name}.activation_max"] = seen.largest
            vectors[f"{name}.weight_max"] = weight.abs().amax(0)
            kept = checkpoint is not None and not checkpoint.quantizes([part for part, _ in parts])
            if checkpoint is None:
                settings = search(seen.rows(), weight, seen.largest)
            elif kept:
                settings = Settings(None, 1.0, None)
            else:
                settings = checkpoint.settings(name, [part for part, _ in parts], weight, model)
            if settings.smoothing is not None:
                vectors[f"{name}.smoothing"] = settings.smoothing
            plain = losses(seen.rows(), weight, Settings(None, 1.0, None))
            chosen = losses(seen.rows(), weight, settings)
            found[name] = LayerProfile(plain, chosen, settings.alpha, settings.clip, kept)
            phase.advance()
    output.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: vector.contiguous() for name, vector in vectors.items()}
    save_file(contiguous, output, {"layers": json.dumps({name: asdict(layer) for name, layer in found.items()})})
    Terminal().print(_table(found))
    console.info(f"{output}: {len(found)} layers, {sum(map(len, texts))} tokens; next: megatron-rl quantize setup")


def setup(profile_file: Path, output: Path, max_error: float, skip: list[str]) -> None:
    """Write the quantization file `output`, and its vectors beside it; layers with a larger error are left out.

    Raises:
        ConfigError: when `profile_file` is no profile.
    """
    found, smoothing = read_profile(profile_file)
    settings: dict[str, LayerSettings] = {}
    for name, layer in found.items():
        reason = None
        if layer.kept:
            reason = _KEPT
        elif layer.chosen.error > max_error:
            reason = f"its output's relative error in int8 was {layer.chosen.error:.3f}, above {max_error:g}"
        settings[name] = LayerSettings(
            alpha=layer.alpha, clip=layer.clip, error=float(f"{layer.chosen.error:.4g}"), skip=reason
        )
    vectors = output.with_suffix(".safetensors")
    if vectors.resolve() == profile_file.resolve():
        raise ConfigError(f"--output {output} would put its vectors in place of the profile; choose another name.")
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: vector for name, vector in smoothing.items() if settings[name].skip is None}, vectors)
    file = QuantizationFile(quantization="int8", skip=skip, max_error=max_error, vectors=vectors.name, layers=settings)
    output.write_text(yaml.safe_dump(file.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    console = Console(enabled=True)
    for name, layer_settings in settings.items():
        if layer_settings.skip is not None:
            console.info(f"{name} stays in high precision: {layer_settings.skip}")
    console.info(f"{output}: set rollout.quantization=int8 and rollout.quantization_profile={output}")


def read_profile(file: Path) -> tuple[dict[str, LayerProfile], dict[str, Tensor]]:
    """The layers of a profile, and the smoothing vectors of those that have one.

    Raises:
        ConfigError: when the file is missing or is no profile.
    """
    try:
        with safe_open(file, "pt") as stored:
            layers = json.loads((stored.metadata() or {})["layers"])
            names = [name for name in stored.keys() if name.endswith(".smoothing")]  # noqa: SIM118
            vectors = {name.removesuffix(".smoothing"): stored.get_tensor(name) for name in names}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{file} is no profile ({type(error).__name__}); make one with `megatron-rl quantize profile`."
        ) from None
    read = {
        name: LayerProfile(**values | {key: Losses(**values[key]) for key in ("plain", "chosen")})
        for name, values in layers.items()
    }
    return read, vectors


class QuantizedCheckpoint:
    """A model in the compressed-tensors format: int8 weights, with a scale per output channel."""

    def __init__(self, folder: Path) -> None:
        """Find its tensors; raises ConfigError when it has none, or is quantized in another way."""
        self._folder = folder
        self._files = tensor_files(folder, "--quantized ")
        if not any(name.endswith("_proj.weight_scale") for name in self._files):
            raise ConfigError(
                f"--quantized {folder} has no weight_scale tensors; give a W8A8 checkpoint as llm-compressor writes it."
            )

    def quantizes(self, parts: list[str]) -> bool:
        """Whether it holds these projections in int8; raises ConfigError for another format."""
        scaled = [f"{part}.weight_scale" in self._files for part in parts]
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
        """Smoothing and clipping of a layer, by comparison with the unquantized `weight` [out, in] and `model`."""
        levels = torch.cat([self._tensor(f"{part}.weight") for part in parts])
        if levels.shape != weight.shape:
            raise ConfigError(f"--quantized {self._folder} is another model: {layer} has the shape {[*levels.shape]}.")
        scales = torch.cat([self._tensor(f"{part}.weight_scale").flatten() for part in parts])
        block, _, place = layer.partition(".self_attn" if ".self_attn" in layer else ".mlp")
        norm = next((name for of, name in _NORMS.items() if layer == f"{block}.{of}"), None)
        norms = None
        if norm is not None:
            norms = (model.get_parameter(f"{block}.{norm}.weight"), self._tensor(f"{block}.{norm}.weight"))
        return from_checkpoint(weight, levels, scales, norms)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._files:
            raise ConfigError(f"--quantized {self._folder} lacks the tensor {name}; is it the whole model?")
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _texts(config: Config, prompts: int, rollouts: Path | None) -> list[list[int]]:
    tokenizer = load_tokenizer(config.model.path)
    if rollouts is not None:
        batch = read_rollouts(rollouts, len(tokenizer))
        pairs = zip(batch.prompts, batch.responses, strict=True)
        return [prompt + response for prompt, response in pairs][:prompts]
    data = config.data
    loaded = load_prompts(data.train, data, tokenizer, data.split, heldout=False)
    return [prompt.token_ids for prompt in loaded[:prompts]]


def _table(layers: dict[str, LayerProfile]) -> Table:
    table = Table("layer", box=None)
    for heading in ("plain error", "error", "alpha", "clip", "clipped", "flushed"):
        table.add_column(heading, justify="right")
    for cells in _cells(layers):
        table.add_row(*cells)
    return table


def _cells(layers: dict[str, LayerProfile]) -> Iterator[list[str]]:
    for name, layer in layers.items():
        alpha = "-" if layer.alpha is None else f"{layer.alpha:g}"
        numbers = [f"{layer.plain.error:.4f}", f"{layer.chosen.error:.4f}", alpha, f"{layer.clip:g}"]
        yield [name, *numbers, f"{layer.chosen.clipped:.2%}", f"{layer.chosen.flushed:.2%}"]
