"""Engines that multiply in int8: what they compute, and what they hold after new weights."""

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor
from torch.nn import Module, Parameter
from transformers import AutoModelForCausalLM
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from drafter.eagle.head_files import save_head
from megatron_rl.config import ConfigError
from rollout.engine.engine_arguments import engine_arguments
from rollout.engine.vllm_options import check_vllm_options
from rollout.engine.worker import live_weight
from rollout.fleet.fleet import RolloutFleet
from rollout.quantization.int8 import PackedWeight, reference_linear
from rollout.quantization.online import Float32HeadMethod, GpuKernel, Int8LinearMethod, RolloutQuantization
from rollout.types import Rollout
from rollout.weight_transfer.connection import segment_name
from tests.capabilities import require_int8
from tests.rollout.helpers import (
    VOCAB_LIMIT,
    OpenEngine,
    generate,
    make_config,
    make_environment,
    make_requests,
    open_arguments,
    open_engines,
)
from tests.rollout.speculation.test_eagle import random_head
from tests.rollout.weight_transfer.test_weight_transfer import StateDictSource, _load, connected

OUT, IN = 96, 160
SKIP = ["*.layers.0.mlp.down_proj", "*.layers.1.self_attn.k_proj"]  # the second takes q and v with it
SKIPPED = {"model.layers.0.mlp.down_proj", "model.layers.1.self_attn.qkv_proj"}


def test_the_float32_head_multiplies_bf16_weights_in_float32() -> None:
    torch.manual_seed(0)
    layer: Any = Module()
    layer.weight = Parameter(torch.randn(OUT, IN).bfloat16(), requires_grad=False)
    layer.quant_method, layer.params_dtype, layer.input_size_per_partition = Float32HeadMethod(), torch.bfloat16, IN
    x = torch.randn(3, IN).bfloat16()
    layer.quant_method.process_weights_after_loading(layer)
    logits = layer.quant_method.apply(layer, x)
    assert logits.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits, x.float() @ layer.weight.float().T, atol=1e-4, rtol=0)
    assert torch.equal(live_weight(layer), layer.weight)  # what `rollout.verify_weights` reads


def test_vllms_kernel_gets_smoothed_and_clipped_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    require_int8()
    torch.manual_seed(0)
    monkeypatch.setattr("rollout.quantization.online._ELEMENTS", 40 * IN)  # 40 rows at a time
    matrix, x, smoothing = torch.randn(OUT, IN), torch.randn(5, IN), torch.rand(IN) * 5 + 0.2
    layer: Any = Module()
    same = PackedWeight.empty(OUT, IN)
    layer.weight, layer.logical_widths = Parameter(matrix, requires_grad=False), [OUT]
    kernel = GpuKernel()
    rounding = kernel.quantize(layer, smoothing, 0.9)
    assert rounding == pytest.approx(same.fill(matrix, smoothing, 0.9)) and rounding.clipped > 0
    product = kernel.multiply(layer, x, smoothing.reciprocal(), None)
    torch.testing.assert_close(product, reference_linear(x, matrix, None, smoothing, 0.9), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("fp8", "Fp8PerTensorOnlineLinearMethod"),
        ("fp8_channel", "Fp8PtpcOnlineLinearMethod"),
        ("fp8_block", "Fp8PerBlockOnlineLinearMethod"),
    ],
)
def test_fp8_is_vllms_own_method(kind: str, method: str) -> None:
    config = RolloutQuantization.from_config({"kind": kind, "skip": [], "lm_head_fp32": False, "profile": None})
    resolved = config.resolve_quant_method_cls(LinearBase, "model.layers.0.mlp.down_proj")
    assert resolved is not None and resolved[-1].__name__ == method


def test_the_method_is_not_to_be_set_among_vllms_options() -> None:
    with pytest.raises(ConfigError, match="set rollout.quantization"):
        check_vllm_options({"quantization": "fp8"})


def test_nothing_is_asked_of_vllm_where_nothing_is_to_be_quantized(model: Path, tmp_path: Path) -> None:
    arguments = engine_arguments(
        make_config(tmp_path, model, lm_head_fp32=True), make_environment("float32"), str(model)
    )
    assert "quantization" not in arguments and "hf_overrides" not in arguments
    config = make_config(tmp_path, model, lm_head_fp32=True, vllm={"hf_overrides": {"rope_theta": 5.0}})
    overrides = engine_arguments(config, make_environment("bfloat16"), str(model))["hf_overrides"]
    assert overrides["rope_theta"] == 5.0 and overrides["quantization_config"]["lm_head_fp32"]


class OpenFleet(RolloutFleet):
    """A fleet of engines whose insides can be reached."""

    def _create_actor(self, index: int) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rollout.fleet.engine_actor.RolloutEngine", OpenEngine)
            return super()._create_actor(index)

    def apply(self, function: Any, *arguments: Any) -> Any:
        return ray.get(self.call(0, "apply", function, *arguments))

    def sync(self, weights: dict[str, Tensor], folder: Path) -> None:
        sync = connected(self, StateDictSource(weights), segment_name(str(folder)))
        sync.sync()
        sync.shutdown()

    def rollouts(self) -> list[Rollout]:
        by_key = {(r.prompt_id, r.sample_index): r for r in self.generate(make_requests(12))}
        return [by_key[key] for key in sorted(by_key)]


@pytest.fixture(scope="module")
def engines(
    model: Path, other_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[OpenFleet, OpenFleet, Any, Any]]:
    """Two int8 engines with `model`, in float32 and in bf16; one of each kind with `other_model`."""
    require_int8()
    folder = tmp_path_factory.mktemp("engines")
    bf16 = {"quantization": "int8", "lm_head_fp32": True}
    fp32 = {"quantization": "int8", "quantization_skip": SKIP}
    fleets = [
        OpenFleet(
            make_config(folder / dtype, model, **options), make_environment(dtype), str(model), lambda i: None, False
        )
        for dtype, options in (("float32", fp32), ("bfloat16", bf16))
    ]
    settings = engine_arguments(
        make_config(folder, other_model, **bf16), make_environment("bfloat16"), str(other_model)
    )
    as_bf16 = {name: settings[name] for name in ("dtype", "hf_overrides")}
    fresh_engines = [
        open_arguments(folder, other_model, **fp32),
        open_arguments(folder, other_model, as_bf16, **bf16),
    ]
    with open_engines(fresh_engines) as fresh:
        for fleet in fleets:
            fleet.wait_until_up()
        yield (*fleets, *fresh)
    for fleet in fleets[::-1]:
        fleet.shutdown()


def values(rollouts: list[Rollout]) -> list[tuple[list[int], list[float]]]:
    return [(rollout.token_ids, rollout.logprobs) for rollout in rollouts]


def policy(engine: Any) -> Any:
    return engine._llm.model_executor.driver_worker.model_runner.get_model()


def addresses(engine: Any) -> dict[str, tuple]:
    """Place, shape and strides of every parameter: scales and packed int8 weights among them."""
    return {name: (t.data_ptr(), tuple(t.shape), t.stride()) for name, t in policy(engine).named_parameters()}


def products(engine: Any) -> dict[str, Tensor]:
    """What every linear layer makes of the same input."""
    torch.manual_seed(0)
    return {
        name: layer.quant_method.apply(layer, torch.randn(3, layer.input_size_per_partition).to(layer.params_dtype))
        for name, layer in policy(engine).named_modules()
        if isinstance(layer, LinearBase)
    }


def load_partly(engine: Any, weights: dict[str, Tensor]) -> None:
    model = policy(engine)
    initialize_layerwise_reload(model)
    model.load_weights(weights.items())
    finalize_layerwise_reload(model, engine._llm.model_config)
    engine._llm.reset_prefix_cache()


@pytest.mark.parametrize("number", [0, 1], ids=["float32", "bf16"])
def test_new_weights_make_the_engine_a_fresh_one_and_the_old_ones_restore_it(
    engines: tuple, model: Path, other_model: Path, tmp_path: Path, number: int
) -> None:
    fleet, fresh = engines[number], engines[2 + number]
    before, held = fleet.rollouts(), fleet.apply(addresses)
    fleet.sync(_load(other_model), tmp_path)
    assert fleet.apply(addresses) == held
    assert values(fleet.rollouts()) == values(sorted_by_key(generate(fresh, make_requests(12)))) != values(before)
    fleet.sync(_load(model), tmp_path)
    assert values(fleet.rollouts()) == values(before)


def sorted_by_key(rollouts: list[Rollout]) -> list[Rollout]:
    return sorted(rollouts, key=lambda rollout: (rollout.prompt_id, rollout.sample_index))


def test_scales_are_fresh(engines: tuple, model: Path, tmp_path: Path) -> None:
    fleet, weights = engines[0], _load(model)
    before = fleet.apply(products)
    scaled = {name: 8 * t if name.endswith("_proj.weight") else t for name, t in weights.items()}
    fleet.sync(scaled, tmp_path)
    after = fleet.apply(products)
    fleet.sync(weights, tmp_path)
    for name, product in before.items():
        assert torch.equal(after[name], 8 * product), name  # 8 changes no mantissa


def test_a_partial_update_touches_the_named_layers_only(
    engines: tuple, model: Path, other_model: Path, tmp_path: Path
) -> None:
    fleet = engines[0]
    before, held = fleet.apply(products), fleet.apply(addresses)
    names = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up")]
    fleet.apply(load_partly, {name: _load(other_model)[name] for name in names})
    after = fleet.apply(products)
    assert fleet.apply(addresses) == held
    fleet.sync(_load(model), tmp_path)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "model.layers.1.mlp.gate_up_proj"
    }
    restored = fleet.apply(products)
    assert all(torch.equal(before[name], restored[name]) for name in before)


def finish(engine: Any, weights: dict[str, Tensor]) -> None:
    model = policy(engine)
    model.load_weights(weights.items())
    finalize_layerwise_reload(model, engine._llm.model_config)


def test_a_partial_update_of_a_fused_layer_is_refused_until_it_is_complete(
    engines: tuple, model: Path, tmp_path: Path
) -> None:
    fleet, weights = engines[0], _load(model)
    before, held = fleet.apply(products), fleet.apply(addresses)
    part = {f"model.layers.{i}.self_attn.q_proj.weight": torch.zeros(128, 64) for i in (0, 1)}  # one is left out
    for name, weight in part.items():
        with pytest.raises(ValueError, match=rf"names 1 of {name.removesuffix('.weight')}.*one layer in vLLM"):
            fleet.apply(load_partly, {name: weight})
        whole = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        fleet.apply(finish, {part_name: 0 * weights[part_name] for part_name in whole})
        after = fleet.apply(products)
        changed = {layer for layer in before if not torch.equal(before[layer], after[layer])}
        assert changed == {name.replace("q_proj.weight", "qkv_proj")}
        with pytest.raises(ValueError, match="one layer in vLLM"):
            fleet.apply(load_partly, {name: weight})
        fleet.sync(weights, tmp_path)  # a new update goes on from there
        after = fleet.apply(products)
        assert fleet.apply(addresses) == held
        assert all(torch.equal(before[layer], after[layer]) for layer in before)


def test_weights_loaded_without_a_reload_are_refused(engines: tuple, model: Path) -> None:
    def load(engine: Any, weights: dict[str, Tensor]) -> None:
        policy(engine).load_weights(weights.items())

    before = engines[0].apply(products)
    name = "model.layers.1.mlp.down_proj"
    with pytest.raises(ValueError, match=f"{name} is quantized, so load_weights alone cannot change it"):
        engines[0].apply(load, {f"{name}.weight": _load(model)[f"{name}.weight"]})
    after = engines[0].apply(products)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_int8_loses_is_reported_after_every_sync(engines: tuple, model: Path, tmp_path: Path) -> None:
    fleet, weights = engines[0], _load(model)
    spiked = {name: weight.clone() for name, weight in weights.items()}
    spiked["model.layers.0.self_attn.o_proj.weight"][:, 0] = 1000  # all others become 0 beside it
    before = fleet.weight_rounding()[0]
    fleet.sync(spiked, tmp_path)
    after = fleet.weight_rounding()[0]
    fleet.sync(weights, tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"model.layers.0.self_attn.o_proj"}
    assert all(0.001 < rounding.error < 0.02 and rounding.clipped == 0 for rounding in before.values())
    assert fleet.weight_rounding()[0] == before


def test_layers_left_out_multiply_as_if_nothing_were_quantized(engines: tuple, model: Path) -> None:
    weights = _load(model)

    def plain(engine: Any) -> set[str]:
        modules = policy(engine).named_modules()
        return {
            name
            for name, m in modules
            if isinstance(m, LinearBase) and not isinstance(m.quant_method, Int8LinearMethod)
        }

    assert engines[0].apply(plain) == SKIPPED
    torch.manual_seed(0)
    for name, product in engines[0].apply(products).items():
        fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
        parent, _, own = name.rpartition(".")
        matrix = torch.cat([weights[f"{parent}.{part}.weight"] for part in fused.get(own, [own])])
        x = torch.randn(3, matrix.shape[1])
        gap = (product - x @ matrix.T).abs().max()
        assert gap < 1e-4 if name in SKIPPED else 1e-4 < gap < 0.2, name


def test_logprobs_are_those_of_the_quantized_model(engines: tuple, model: Path) -> None:
    unquantized = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    quantized = copy.deepcopy(unquantized)
    for name, module in quantized.named_modules():
        if name.endswith("_proj") and re.sub(r"\b[qkv]_proj", "qkv_proj", name) not in SKIPPED:
            module.forward = lambda x, w=module.weight: reference_linear(x[0], w, None)[None]
    gaps: dict[str, list[Tensor]] = {"quantized": [], "unquantized": []}
    for rollout in engines[0].rollouts():
        tokens = torch.tensor(rollout.token_ids)
        for name, reference in (("quantized", quantized), ("unquantized", unquantized)):
            with torch.no_grad():
                logits = reference(torch.tensor([rollout.prompt_ids + rollout.token_ids])).logits[0]
            logits[:, VOCAB_LIMIT:] = -torch.inf
            expected = logits[len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)[torch.arange(len(tokens)), tokens]
            gaps[name].append((torch.tensor(rollout.logprobs) - expected).abs())
    own, other = (torch.cat(gaps[name]) for name in ("quantized", "unquantized"))
    # Where attention was summed in another order a value may be rounded the other way: rarely, by a step of 1/127.
    assert own.median() < 1e-4 and own.mean() < 5e-3
    assert 1e-2 < other.mean() < 0.3 and other.mean() > 10 * own.mean()


def test_logits_of_a_bf16_engine_are_float32_on_request(engines: tuple, model: Path) -> None:
    def logits(engine: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        hidden = torch.randn(5, 64).bfloat16()
        return hidden, policy(engine).compute_logits(hidden)

    hidden, computed = engines[1].apply(logits)
    embedding = _load(model)["model.embed_tokens.weight"].bfloat16().float()
    assert computed.dtype == torch.float32
    torch.testing.assert_close(computed, hidden.float() @ embedding.T, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_drafts_change_no_token_and_the_head_is_not_quantized(model: Path, tmp_path: Path) -> None:
    require_int8()
    save_head(random_head(model, 0), tmp_path / "head")
    speculation = {"adaptive": "static", "drafters": ["eagle", "ngram"], "max_draft_tokens": 4}
    arguments = [
        open_arguments(tmp_path, model, quantization="int8"),
        open_arguments(
            tmp_path, model, drafter_path=str(tmp_path / "head"), quantization="int8", speculation=speculation
        ),
    ]

    def methods_of_head(engine: Any) -> set[str]:
        head = engine._llm.model_executor.driver_worker.model_runner.get_draft_model()
        return {type(m.quant_method).__name__ for m in head.modules() if isinstance(m, LinearBase)}

    requests = make_requests(5, samples=8, max_tokens=40, temperature=0.6)
    with open_engines(arguments) as (plain, drafting):
        assert ray.get(drafting.apply.remote(methods_of_head)) == {"UnquantizedLinearMethod"}
        expected = generate(plain, requests)
        for drafter in ("eagle", "ngram"):
            ray.get(drafting.set_speculation.remote("static", 4, [drafter]))
            assert [r.token_ids for r in generate(drafting, requests)] == [r.token_ids for r in expected]
        assert ray.get(drafting.take_speculation_counts.remote()).drafted > 0


@pytest.mark.slow
@pytest.mark.parametrize(("eager", "tp_size"), [(False, 1), (True, 2)], ids=["compiled", "tp 2"])
def test_new_weights_reach_compiled_and_split_engines(
    model: Path, other_model: Path, tmp_path: Path, eager: bool, tp_size: int
) -> None:
    require_int8()
    config = make_config(tmp_path, model, quantization="int8", tp_size=tp_size)
    environment = replace(make_environment(), vllm={"max_num_seqs": 32, "enforce_eager": eager})
    fleets = [OpenFleet(config, environment, str(path), lambda i: None, False) for path in (model, other_model)]
    try:
        for fleet in fleets:
            fleet.wait_until_up()
        changed, fresh = fleets
        before = changed.rollouts()
        changed.sync(_load(other_model), tmp_path)
        assert values(changed.rollouts()) == values(fresh.rollouts()) != values(before)
        changed.sync(_load(model), tmp_path)
        assert values(changed.rollouts()) == values(before)
    finally:
        for fleet in fleets[::-1]:
            fleet.shutdown()
