"""`megatron-rl quantize setup`: from the profile of a model's layers to the file that engines read.

A profile is one safetensors file: per layer the largest activation and weight of each input channel and the smoothing
vector, and in its header what was measured and chosen. `megatron_rl.calibration.profile` makes it.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.calibration.smoothquant import Losses
from megatron_rl.config import ConfigError
from megatron_rl.config.quantization import LayerSettings, QuantizationFile
from megatron_rl.observability.console import Console

_KEPT = "the quantized checkpoint keeps it in high precision"


@dataclass(frozen=True)
class LayerProfile:
    """What was measured of a layer, and chosen for it."""

    plain: Losses
    """In int8 without smoothing and clipping."""
    chosen: Losses
    """In int8 with what was chosen."""
    alpha: float | None
    """See `Settings`."""
    clip: float
    """See `Settings`."""
    kept: bool
    """The quantized checkpoint that was compared with does not quantize this layer."""


def check_output(file: Path) -> None:
    """Refuse a place where vectors written beside `file` would be taken for a model's weights.

    Raises:
        ConfigError: when it is one.
    """
    if (file.parent / "config.json").exists():
        raise ConfigError(
            f"--output {file} is in a model's folder, whose *.safetensors are its weights; choose another."
        )


def write_profile(file: Path, layers: dict[str, LayerProfile], vectors: dict[str, Tensor]) -> None:
    """Store the layers, and vectors named `<layer>.activation_max`, `<layer>.weight_max` and `<layer>.smoothing`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(vectors, file, {"layers": json.dumps({name: asdict(layer) for name, layer in layers.items()})})


def setup(profile_file: Path, output: Path, max_error: float, skip: list[str]) -> None:
    """Write the quantization file `output`, and its vectors beside it; layers with a larger error are left out.

    Raises:
        ConfigError: when `profile_file` is not a profile, or `output` is in a model's folder.
    """
    check_output(output)
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
        ConfigError: when the file is missing or is not a profile.
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


def profile_table(layers: dict[str, LayerProfile]) -> Table:
    """What `profile` prints."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("layer", min_width=max(map(len, layers)))
    for heading in ("plain", "smoothed", "alpha", "clip", "clipped", "flushed"):
        table.add_column(heading, justify="right")
    for cells in _cells(layers):
        table.add_row(*cells)
    return table


def _cells(layers: dict[str, LayerProfile]) -> Iterator[list[str]]:
    for name, layer in layers.items():
        alpha = "-" if layer.alpha is None else f"{layer.alpha:g}"
        numbers = [f"{layer.plain.error:.4f}", f"{layer.chosen.error:.4f}", alpha, f"{layer.clip:g}"]
        yield [name, *numbers, f"{layer.chosen.clipped:.1%}", f"{layer.chosen.flushed:.1%}"]
