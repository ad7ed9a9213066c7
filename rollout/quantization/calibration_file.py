"""The engine's side of `megatron-rl quantize setup`: smoothing and clipping of each layer, read from its files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float32
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.config.quantization import read_quantization_file

_REMEDY = "make it anew for this model, with `megatron-rl quantize profile` and `setup`"


@dataclass(frozen=True)
class LayerCalibration:
    """How one linear layer is quantized to int8, see `rollout.quantization.int8`."""

    name: str
    smoothing: Float32[Tensor, "in"] | None
    """Of the whole layer, over all tensor-parallel ranks."""
    clip: float
    """Largest weight of a channel after clipping, as a fraction of what it was."""
    skip: str | None
    """Why the layer is not quantized; None: it is."""

    def part_of(self, layer: Any) -> Float32[Tensor, "own_in"] | None:
        """The smoothing of the inputs that this rank's part of a vLLM layer has, on the device of its weight.

        Raises:
            ConfigError: the layer has another number of inputs.
        """
        if self.smoothing is None:
            return None
        if len(self.smoothing) != layer.input_size:
            raise ConfigError(
                f"The quantization file smooths {len(self.smoothing)} inputs of {self.name}, which has "
                f"{layer.input_size}; {_REMEDY}."
            )
        own = layer.input_size_per_partition
        first = layer.tp_rank * own if own < layer.input_size else 0
        return self.smoothing[first : first + own].to(layer.weight.device)


NOT_CALIBRATED = LayerCalibration("", None, 1.0, None)


class Calibration:
    """A quantization file, with its vectors."""

    def __init__(self, path: str) -> None:
        """Read the file.

        Raises:
            ConfigError: it, or the file of vectors beside it, cannot be read.
        """
        self._path = path
        self._file = read_quantization_file(path)
        self._vectors: dict[str, Tensor] = {}
        if self._file.vectors is not None:
            vectors = Path(path).parent / self._file.vectors
            try:
                self._vectors = load_file(vectors)
            except (OSError, SafetensorError) as error:
                raise ConfigError(
                    f"{vectors}, the smoothing vectors of {path}, cannot be read ({type(error).__name__}); keep the "
                    "two files together."
                ) from None

    def of_layer(self, name: str) -> LayerCalibration:
        """The settings of a layer, by its name in vLLM.

        Raises:
            ConfigError: the file lacks the layer.
        """
        if not self._file.layers:
            return NOT_CALIBRATED
        if name not in self._file.layers:
            raise ConfigError(f"The quantization file {self._path} has no layer {name}; {_REMEDY}.")
        settings = self._file.layers[name]
        return LayerCalibration(name, self._vectors.get(name), settings.clip, settings.skip)
