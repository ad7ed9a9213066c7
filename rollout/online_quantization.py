"""Online quantization inside vLLM: weights arrive in training precision and become int8 or fp8 layer by layer.

INT8 is W8A8: symmetric, with one scale per output channel of a weight and one per token of the activations, both fresh
(`amax / 127`). It is a sibling of vLLM's online FP8 methods and lives on the same hooks: weights are declared on the
meta device, and vLLM's layerwise reload materializes a layer, loads it, calls `process_weights_after_loading` and
copies the result to where the old one was. So one layer at a time exists in both precisions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm import _custom_ops as ops
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
from rollout import int8
from rollout.quantization import METHOD

# What vLLM calls the values of `rollout.quantization`. It has no method for linear layers of the first kind.
_INT8 = "int8_per_channel_static"
_WEIGHTS = {"int8": _INT8, "fp8": "fp8_per_tensor", "fp8_channel": "fp8_per_channel", "fp8_block": "fp8_per_block"}
_PROCESSED = "_already_called_process_weights_after_loading"  # vLLM's mark on a layer; a reload takes it off


class RolloutQuantization(OnlineQuantizationConfig):
    """vLLM's online quantization with int8 for linear layers, layers left out by name, and a float32 output layer."""

    def __init__(self, kind: str, skip: list[str], lm_head_fp32: bool) -> None:
        super().__init__(
            QuantizationConfigArgs(targets={}) if kind == "none" else QuantizationConfigArgs(linear=_WEIGHTS[kind])
        )
        self._kind, self._skip, self._lm_head_fp32 = kind, skip, lm_head_fp32

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RolloutQuantization":
        return cls(config["kind"], config["skip"], config["lm_head_fp32"])

    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, ParallelLMHead):
            return Float32HeadMethod() if self._lm_head_fp32 else None
        if not isinstance(layer, LinearBase):
            return None
        if self._kind == "none" or is_skipped(self._checkpoint_names(prefix), self._skip):
            return UnquantizedLinearMethod()
        if self._kind != "int8":
            return super().get_quant_method(layer, prefix)
        self.quantized_layers[prefix] = ("linear", _INT8, None)  # for vLLM's log
        return Int8LinearMethod()

    def _checkpoint_names(self, prefix: str) -> list[str]:
        parent, _, own_name = prefix.rpartition(".")
        return [f"{parent}.{name}" for name in self.packed_modules_mapping.get(own_name, [own_name])]


class Int8LinearMethod(OnlineLinearBase):
    """W8A8 for a linear layer: an operator of ours on CPU, what vLLM chooses (CUTLASS) elsewhere."""

    activation_quant_key = None  # activations arrive as they are

    def __init__(self) -> None:
        super().__init__()
        self._kernel: Any = (
            CpuKernel()
            if current_platform.is_cpu()
            else init_int8_linear_kernel(
                is_channelwise=True,
                is_static_input_scheme=False,
                input_symmetric=True,
                module_name=type(self).__name__,
            )
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the layer's weight, [out, in] float32 or bfloat16, by int8 and a float32 scale per output channel."""
        if getattr(layer, _PROCESSED, False):
            return
        if not current_platform.is_cpu():
            quantized, scale, _ = ops.scaled_int8_quant(layer.weight)
            replace_parameter(layer, "weight", quantized)
            replace_parameter(layer, "weight_scale", scale)
        self._kernel.process_weights_after_loading(layer)
        setattr(layer, _PROCESSED, True)

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] times the weight, plus bias [out]; the result [..., out] has the dtype of x."""
        result: Tensor = self._kernel.apply_weights(layer, x, bias)
        return result


class CpuKernel:
    """`rollout.int8` with the methods of vLLM's kernels."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantize and pack the layer's weight, [out, in]; its place takes what `rollout.int8.PackedWeight` holds."""
        weight = int8.PackedWeight.empty(*layer.weight.shape)
        weight.fill(layer.weight)
        replace_parameter(layer, "weight", weight.packed)
        replace_parameter(layer, "weight_scale", weight.scales)
        replace_parameter(layer, "weight_sum", weight.sums)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Int8LinearMethod.apply`."""
        weight = int8.PackedWeight(layer.weight, layer.weight_scale, layer.weight_sum)
        rows = x.reshape(-1, x.shape[-1])
        return int8.linear(rows, weight, None if bias is None else bias.float()).view(*x.shape[:-1], -1)


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


def register_online_quantization() -> None:
    """Make the method known to vLLM in this process; safe to call more than once."""
    register_quantization_config(METHOD)(RolloutQuantization)
