"""Online quantization inside vLLM: weights arrive in training precision and become int8 or fp8 layer by layer.

INT8 is W8A8: symmetric, with one scale per output channel of a weight and one per token of the activations, computed
anew each time (`amax / 127`). Like vLLM's online FP8 methods it declares weights on the meta device; vLLM's layerwise
reload materializes a layer, loads it, calls `process_weights_after_loading` and copies the result over the old one. So
one layer at a time exists in both precisions.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.config.quantization import QuantizationConfigArgs
from vllm.model_executor.kernels.linear import init_int8_linear_kernel
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
from vllm.model_executor.layers.quantization.online.fp8 import OnlineLinearBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from megatron_rl.config.quantization import is_skipped
from rollout.quantization import int8
from rollout.quantization.calibration_file import NOT_CALIBRATED, Calibration, LayerCalibration
from rollout.quantization.quantization_settings import METHOD, QuantizationSettings
from rollout.quantization.whole_layers import load_whole_layers_only

# What vLLM calls the values of `rollout.quantization`. It has no method for linear layers of the first kind.
_INT8 = "int8_per_channel_static"
_WEIGHTS = {"int8": _INT8, "fp8": "fp8_per_tensor", "fp8_channel": "fp8_per_channel", "fp8_block": "fp8_per_block"}
_PROCESSED = "_already_called_process_weights_after_loading"
"""vLLM's mark on a layer; a reload removes it."""
_ELEMENTS = 2**24
"""Elements of a weight that are quantized at a time on GPUs, where a float32 copy of all of it may not fit."""
log = logging.getLogger(__name__)


class RolloutQuantization(OnlineQuantizationConfig):
    """vLLM's online quantization with int8 for linear layers, layers left out by name, and a float32 output layer."""

    def __init__(self, settings: QuantizationSettings) -> None:
        kind = settings.kind
        super().__init__(
            QuantizationConfigArgs(targets={}) if kind == "none" else QuantizationConfigArgs(linear=_WEIGHTS[kind])
        )
        self._settings = settings
        self._calibration = None if settings.profile is None else Calibration(settings.profile)

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RolloutQuantization":
        return cls(QuantizationSettings.from_vllm(config))

    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, ParallelLMHead):
            return Float32HeadMethod() if self._settings.lm_head_fp32 else None
        if not isinstance(layer, LinearBase):
            return None
        names = self._checkpoint_names(prefix)
        if self._settings.kind == "none":
            return UnquantizedLinearMethod()
        if is_skipped(names, self._settings.skip):
            return load_whole_layers_only(UnquantizedLinearMethod(), names, quantizes=False)
        if self._settings.kind != "int8":
            return load_whole_layers_only(super().get_quant_method(layer, prefix), names, quantizes=True)
        calibration = NOT_CALIBRATED if self._calibration is None else self._calibration.of_layer(prefix)
        if calibration.skip is not None:
            log.warning("%s is not quantized: %s.", prefix, calibration.skip)
            return load_whole_layers_only(UnquantizedLinearMethod(), names, quantizes=False)
        self.quantized_layers[prefix] = ("linear", _INT8, None)  # for vLLM's log
        return load_whole_layers_only(Int8LinearMethod(calibration), names, quantizes=True)

    def _checkpoint_names(self, prefix: str) -> list[str]:
        parent, _, own_name = prefix.rpartition(".")
        return [f"{parent}.{name}" for name in self.packed_modules_mapping.get(own_name, [own_name])]


class Int8LinearMethod(OnlineLinearBase):
    """W8A8 for a linear layer: an operator of ours on CPU, what vLLM chooses (CUTLASS) elsewhere."""

    activation_quant_key = None  # activations arrive as they are

    def __init__(self, calibration: LayerCalibration = NOT_CALIBRATED) -> None:
        super().__init__()
        self.calibration = calibration
        self.rounding = int8.Rounding(0.0, 0.0)  # of the weights that are loaded
        self._kernel: Any = CpuKernel() if current_platform.is_cpu() else GpuKernel()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the layer's weight, [out, in] float32 or bfloat16, by int8 and a float32 scale per output channel.

        A smoothed layer also gets `factors`, [in] float32, for its activations.

        Raises:
            ConfigError: the smoothing has another size than the layer.
        """
        if getattr(layer, _PROCESSED, False):
            return
        smoothing = self.calibration.part_of(layer)
        self.rounding = self._kernel.quantize(layer, smoothing, self.calibration.clip)
        if smoothing is not None:
            replace_parameter(layer, "factors", smoothing.reciprocal())
        setattr(layer, _PROCESSED, True)

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] times the weight, plus bias [out]; the result [..., out] has the dtype of x."""
        factors = layer.factors if self.calibration.smoothing is not None else None
        result: Tensor = self._kernel.multiply(layer, x, factors, bias)
        return result


class CpuKernel:
    """`rollout.quantization.int8` on a vLLM layer."""

    def quantize(self, layer: Any, smoothing: Tensor | None, clip: float) -> int8.Rounding:
        """Quantize and pack the layer's weight, [out, in], and replace it by the parts of a `PackedWeight`."""
        weight = int8.PackedWeight.empty(*layer.weight.shape)
        rounding = weight.fill(layer.weight, smoothing, clip)
        replace_parameter(layer, "weight", weight.packed)
        replace_parameter(layer, "weight_scale", weight.scales)
        replace_parameter(layer, "weight_sum", weight.sums)
        return rounding

    def multiply(self, layer: Any, x: Tensor, factors: Tensor | None, bias: Tensor | None) -> Tensor:
        """See `Int8LinearMethod.apply`; activations are multiplied with `factors` [in] first."""
        weight = int8.PackedWeight(layer.weight, layer.weight_scale, layer.weight_sum, factors)
        rows = x.reshape(-1, x.shape[-1])
        return int8.linear(rows, weight, None if bias is None else bias.float()).view(*x.shape[:-1], -1)


class GpuKernel:
    """The same with the kernel that vLLM chooses."""

    def __init__(self) -> None:
        self._kernel: Any = init_int8_linear_kernel(
            is_channelwise=True,
            is_static_input_scheme=False,
            input_symmetric=True,
            module_name=Int8LinearMethod.__name__,
        )

    def quantize(self, layer: Any, smoothing: Tensor | None, clip: float) -> int8.Rounding:
        """Quantize the layer's weight, [out, in], and convert it to the kernel's layout."""
        weight = layer.weight
        levels = torch.empty_like(weight, dtype=torch.int8)
        scales = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
        sums = torch.zeros(3, dtype=torch.float64, device=weight.device)
        rows = max(1, _ELEMENTS // weight.shape[1])  # at a time, in float32
        for part, part_levels, part_scales in zip(
            weight.split(rows), levels.split(rows), scales.split(rows), strict=True
        ):
            wide, part_scales[:, 0] = int8.quantized(part, smoothing, clip)
            part_levels.copy_(wide)
            sums += int8.rounding_sums(part, wide, part_scales[:, 0], smoothing)
        replace_parameter(layer, "weight", levels)
        replace_parameter(layer, "weight_scale", scales)
        for absent in ("input_scale", "input_zero_point", "azp_adj"):  # the kernels look for them
            setattr(layer, absent, None)
        self._kernel.process_weights_after_loading(layer)
        return int8.Rounding.of(sums, weight.numel())

    def multiply(self, layer: Any, x: Tensor, factors: Tensor | None, bias: Tensor | None) -> Tensor:
        """See `CpuKernel.multiply`."""
        product: Tensor = self._kernel.apply_weights(layer, x if factors is None else (x * factors).to(x.dtype), bias)
        return product


class Float32HeadMethod(UnquantizedEmbeddingMethod):
    """An output layer that computes float32 logits from its weight in the engine's dtype, which float32 holds exactly.

    On CPU it multiplies with a packed float32 copy, made anew with every weight; on CUDA it accumulates in float32.
    """

    def process_weights_after_loading(self, layer: Any) -> None:
        if not current_platform.is_cpu():
            return
        wide: Any = Module()
        wide.weight = Parameter(layer.weight.float(), requires_grad=False)
        dispatch_cpu_unquantized_gemm(wide, remove_weight=True)
        layer.cpu_linear = wide.cpu_linear

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [rows, in] times the weight, plus bias [out]: logits [rows, out] float32."""
        bias = None if bias is None else bias.float()
        if current_platform.is_cpu():
            return super().apply(layer, x.float(), bias)
        logits = torch.mm(x, layer.weight.t(), out_dtype=torch.float32)
        return logits if bias is None else logits + bias


def weight_rounding(model: Module) -> dict[str, int8.Rounding]:
    """What int8 did to the weights that each layer of a vLLM model holds."""
    return {
        name: layer.quant_method.rounding
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "quant_method", None), Int8LinearMethod)
    }


def register_online_quantization() -> None:
    """Make the method known to vLLM in this process; safe to call more than once."""
    register_quantization_config(METHOD)(RolloutQuantization)
