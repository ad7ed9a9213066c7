"""An engine on a CPU packs new weights of experts as it packed the first ones."""

from types import SimpleNamespace

import torch
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from rollout.engine.vllm_patches import install_coupled_sampling

EXPERTS, HIDDEN, INNER = 4, 64, 32


def make_layer(shapes: SimpleNamespace) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.moe_config = shapes
    layer.activation = MoEActivation.SILU
    for name, shape in (("w13_weight", (EXPERTS, 2 * INNER, HIDDEN)), ("w2_weight", (EXPERTS, HIDDEN, INNER))):
        layer.register_parameter(name, torch.nn.Parameter(torch.randn(shape), requires_grad=False))
    return layer


def test_new_weights_are_packed_for_the_kernel() -> None:
    install_coupled_sampling(None)
    shapes = SimpleNamespace(intermediate_size_per_partition=INNER, activation=MoEActivation.SILU, hidden_dim=HIDDEN)
    experts = object.__new__(CPUUnquantizedExperts)
    experts.moe_config = shapes
    method = object.__new__(UnquantizedFusedMoEMethod)
    torch.nn.Module.__init__(method)
    method.unquantized_backend = UnquantizedMoeBackend.CPU
    method.moe_kernel = SimpleNamespace(fused_experts=experts)  # so the layer has been loaded before
    layer = make_layer(shapes)
    sent = {name: value.clone() for name, value in layer.named_parameters()}
    method._setup_kernel(layer, layer.w13_weight, layer.w2_weight)
    for name, value in sent.items():
        packed = cpu_prepack_moe_weight(value, "vec")
        assert not torch.equal(packed, value), "packing moves nothing, so that this test cannot fail"
        assert torch.equal(getattr(layer, name), packed)
