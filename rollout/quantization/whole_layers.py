"""Guards against silently wrong weights: half a fused layer, or values for a weight that is quantized already.

vLLM fuses q, k and v, and gate and up. Its layerwise reload accepts an update that names some of them, and fills the
rest of the layer with uninitialised memory; and after quantization a layer's weight still has the loader of the
original.
"""

from typing import Any

from vllm.model_executor.model_loader.reload.layerwise import (
    _place_kernel_tensors,
    get_layerwise_info,
    initialize_layerwise_reload,
)


def load_whole_layers_only(method: Any, names: list[str], quantizes: bool) -> Any:
    """Let a layer's `quant_method` refuse such updates with a ValueError; returns the method.

    Args:
        method: changed in place.
        names: the layer's parts in the Hugging Face format.
        quantizes: the method changes the weight that it gets.
    """
    process = method.process_weights_after_loading

    def process_whole(layer: Any) -> None:
        _refuse_parts(layer, names)
        process(layer)
        if quantizes:
            for parameter_name, parameter in layer.named_parameters(recurse=False):
                if parameter_name != "bias":
                    parameter.weight_loader = refuse

    def refuse(*arguments: Any, **named: Any) -> None:
        raise ValueError(
            f"{names[0]} is quantized, so load_weights alone cannot change it; use vLLM's weight transfer, "
            "collective_rpc('reload_weights'), or initialize_layerwise_reload before load_weights and "
            "finalize_layerwise_reload after it."
        )

    method.process_weights_after_loading = process_whole
    return method


def _refuse_parts(layer: Any, names: list[str]) -> None:
    info = get_layerwise_info(layer)
    parts = {call.arguments.get("loaded_shard_id") for name, call in info.loaded_weights if name == "weight"}
    if not parts or None in parts or len(parts) == len(names):
        return
    if info.kernel_tensors is not None:  # an update: let it continue, without this layer
        _place_kernel_tensors(layer, info)
        info.reset()
        initialize_layerwise_reload(layer)
    raise ValueError(
        f"The weight update names {len(parts)} of {', '.join(names)}, which are one layer in vLLM; send all of them, "
        "and finish the update again."
    )
