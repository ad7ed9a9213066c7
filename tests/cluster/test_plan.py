"""The plan's arithmetic against published figures and figures worked out by hand, and the GPU experiment files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.cluster.plan import fullest_stage, gpu_total, plan
from megatron_rl.cluster.plan_memory import (
    active_parameters,
    engine_memory,
    model_parameters,
    stage_parameters,
    trainer_memory,
)
from megatron_rl.cluster.plan_speed import (
    GPUS,
    StepTime,
    Workload,
    bubble_fraction,
    flops_per_token,
    generation,
    idle_experts,
    microbatches,
    step_time,
)
from megatron_rl.cluster.slurm import Job, node_roles, smallest_job
from megatron_rl.config import Config, ConfigError, load_config
from megatron_rl.config.model_fit import check_layout
from megatron_rl.models.architecture import Architecture
from tests.gpu_models import QWEN3_8B, QWEN3_17B, QWEN3_30B_A3B, QWEN25_7B, QWEN25_32B
from tests.hub import fill_cache, hub_environment, hub_server
from tests.launching import ROOT

CONFIGS = Path(__file__).parents[2] / "configs"
GPU_FILES = {
    "qwen2.5-7b-grpo-8gpu": (QWEN25_7B, 1),
    "qwen2.5-32b-grpo-4nodes": (QWEN25_32B, 4),
    "qwen2.5-32b-dapo-int8": (QWEN25_32B, 16),
    "qwen2.5-32b-dapo-fp8": (QWEN25_32B, 16),
    "qwen3-8b-grpo-h100": (QWEN3_8B, 1),
    "qwen3-8b-history": (QWEN3_8B, 1),
    "qwen3-1.7b-history": (QWEN3_17B, 1),
    "qwen3-8b-fp8-delayed": (QWEN3_8B, 1),
    "qwen3-8b-fp8-current": (QWEN3_8B, 1),
    "qwen3-8b-fp8-blockwise": (QWEN3_8B, 1),
    "qwen3-30b-a3b-grpo": (QWEN3_30B_A3B, 4),
}


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        (QWEN25_7B, 7_615_616_512),
        (QWEN25_32B, 32_763_876_352),
        (QWEN3_8B, 8_190_735_360),
        (QWEN3_17B, 1_720_574_976),
        (QWEN3_30B_A3B, 30_532_122_624),
    ],
)
def test_parameters_are_those_that_the_models_have(shape: dict, published: int) -> None:
    assert model_parameters(Architecture.from_hf(shape)) == published


def test_a_mixture_is_counted_whole_and_as_far_as_a_token_uses_it() -> None:
    arch = Architecture.from_hf(QWEN3_30B_A3B)
    # 120 of 128 experts, of three 2048 x 768 matrices in each of 48 layers, rest. The makers say 3.3 B.
    assert active_parameters(arch) == 30_532_122_624 - 48 * 120 * 3 * 2048 * 768
    assert active_parameters(arch) == pytest.approx(3.3e9, rel=0.02)
    memory = trainer_memory(config(parallel={"ep_size": 8}), arch, dp=32, microbatches=1, stage=0)
    experts = 48 * 16 * 3 * 2048 * 768  # 16 of 128 on a GPU
    shared = 30_532_122_624 - 8 * experts
    assert memory.gradients == 4 * (shared + experts)
    # Four GPUs hold copies of an expert, 32 of everything else.
    assert memory.optimizer == 12 * (shared / 32 + experts / 4)
    # Six operations per active parameter and token; the input table multiplies nothing, attention does.
    assert 6 * active_parameters(arch) == pytest.approx(3 * flops_per_token(arch, 2560), rel=0.1)


def test_a_decoding_step_reads_the_experts_that_its_tokens_choose() -> None:
    arch = Architecture.from_hf(QWEN3_30B_A3B)
    experts = 2 * 48 * 128 * 3 * 2048 * 768
    assert idle_experts(config(), arch, 1) == pytest.approx(experts * 120 / 128)
    assert idle_experts(config(), arch, 1000) < 1e-6 * experts
    assert idle_experts(config(), Architecture.from_hf(QWEN3_8B), 1) == 0


def test_the_parts_of_a_split_model_add_up() -> None:
    arch = Architecture.from_hf(QWEN25_7B)
    stages = [stage_parameters(arch, 4, 7, stage) for stage in range(7)]
    # Each of 4 GPUs has all norms: two per layer, and the last one.
    copies = 3 * (28 * 2 + 1) * arch.hidden_size
    assert 4 * sum(stages) == model_parameters(arch) + copies
    assert stages[0] > stages[1] == stages[5] < stages[6]


def config(**changes: dict) -> Config:
    """`changes` replace whole sections."""
    values = {
        "model": {"path": "m"},
        "train": {"tokens_per_microbatch": 8192},
        "rollout": {"max_tokens": 4096},
        "run_dir": "r",
    }
    return Config.model_validate(values | changes)


def test_memory_of_an_8b_model_by_hand() -> None:
    arch, count = Architecture.from_hf(QWEN3_8B), 8_190_735_360
    memory = trainer_memory(config(), arch, dp=4, microbatches=1, stage=0)
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * count, 4 * count, 3 * count)
    # Per token and layer: 4 x 4096 of the norms, 3 x (4096 + 1024) of attention, 5 x 12288: 93184 numbers of 2 bytes.
    assert memory.activations == 8192 * 36 * 93184 * 2
    assert memory.logits == 2 * 2 * 8192 * 151936
    assert memory.reference == memory.fp8_copies == 0


def test_a_critic_is_a_second_model_and_optimizer_without_the_output_table() -> None:
    arch, count = Architecture.from_hf(QWEN3_8B), 8_190_735_360 - 151_936 * 4096 + 4096
    critic = config(algorithm={"name": "ppo"})
    memory = trainer_memory(critic, arch, dp=4, microbatches=1, stage=0)
    assert memory.critic == (2 + 4 + 12 / 4) * count
    assert memory.total == trainer_memory(config(), arch, dp=4, microbatches=1, stage=0).total + memory.critic
    load = Workload(512, 2048, 256)
    with_critic, without = (step_time(each, arch, GPUS["h100"], load, 4) for each in (critic, config()))
    assert (3 * with_critic.values, with_critic.critic_update) == (pytest.approx(without.update), without.update)
    assert without.values == without.critic_update == 0


def test_full_recompute_keeps_the_layers_inputs_and_one_layer() -> None:
    arch = Architecture.from_hf(QWEN3_8B)
    again = config(train={"tokens_per_microbatch": 8192, "recompute": "full"})
    # The layer's own input is not computed again.
    assert trainer_memory(again, arch, dp=4, microbatches=1, stage=0).activations == 8192 * 2 * (35 * 4096 + 93184)


def test_selective_recompute_keeps_one_feed_forward_layer() -> None:
    arch = Architecture.from_hf(QWEN3_8B)
    again = config(train={"tokens_per_microbatch": 8192, "recompute": "selective"})
    inner = 5 * 12288
    expected = 8192 * 2 * (36 * (93184 - inner) + inner)
    assert trainer_memory(again, arch, dp=4, microbatches=1, stage=0).activations == expected


def test_early_stages_hold_more_micro_batches_but_never_more_than_there_are() -> None:
    arch = Architecture.from_hf(QWEN3_8B)
    settings = config(parallel={"pp_size": 4})
    held = [trainer_memory(settings, arch, 1, 16, stage).activations for stage in range(4)]
    assert [size / held[3] for size in held] == [4, 3, 2, 1]
    assert trainer_memory(settings, arch, 1, 2, 0).activations == 2 * held[3]


def test_engines_round_their_linear_layers_only() -> None:
    arch = Architecture.from_hf(QWEN3_8B)
    plain, rounded = (engine_memory(config(), arch, 80e9, precision) for precision in ("none", "int8"))
    assert plain.weights == 2 * model_parameters(arch)
    table = 151936 * 4096
    assert plain.weights - rounded.weights == pytest.approx(model_parameters(arch) - 2 * table, rel=1e-3)
    assert plain.per_token == 2 * 2 * 36 * 8 * 128
    assert plain.share == 40e9


def test_bubbles_and_micro_batches() -> None:
    assert bubble_fraction(1, 5) == 0
    assert bubble_fraction(4, 12) == pytest.approx(3 / 15)
    load = Workload(512, 1536, 64)
    assert microbatches(config(train={"tokens_per_microbatch": 8192, "num_minibatches": 2}), load, dp=4) == 2


def test_decoding_reads_the_weights_with_few_requests() -> None:
    arch, gpu = Architecture.from_hf(QWEN3_8B), GPUS["h100"]
    few = generation(config(), arch, gpu, Workload(512, 2048, 1), "none")
    assert few.limit.startswith("reading the weights")
    assert few.tokens_per_s == pytest.approx(gpu.bandwidth * 0.6 / (2 * model_parameters(arch)), rel=0.02)
    many = generation(config(), arch, gpu, Workload(512, 2048, 100_000), "none")
    assert many.limit == "room for keys and values"


def test_old_log_probs_cost_a_pass_only_where_the_update_cannot_give_them() -> None:
    arch, load = Architecture.from_hf(QWEN3_8B), Workload(512, 2048, 1024)
    alone, compares = (
        step_time(config(algorithm={"correction": {"normalize": value}}), arch, GPUS["h100"], load, dp=8)
        for value in (False, True)
    )
    assert alone.old_logprobs == 0 < compares.old_logprobs
    assert alone.total + compares.old_logprobs == pytest.approx(compares.total)


def test_generation_beside_training_costs_the_longer_of_the_two() -> None:
    arch, load = Architecture.from_hf(QWEN3_8B), Workload(512, 2048, 1024)

    def seconds(**rollout: Any) -> StepTime:
        return step_time(config(rollout={"max_tokens": 4096, **rollout}), arch, GPUS["h100"], load, dp=8)

    apart, ahead = seconds(placement="separate"), seconds(placement="separate", async_steps=1)
    assert ahead.phases() == apart.phases() and apart.total == pytest.approx(sum(apart.phases().values()))
    assert ahead.total == pytest.approx(max(apart.generate, apart.update) + apart.weight_sync)
    assert seconds(async_steps=1).total == seconds().total, "on the same GPUs nothing is gained"


def test_an_update_is_three_forward_passes_and_four_with_recompute() -> None:
    arch, load = Architecture.from_hf(QWEN3_8B), Workload(512, 2048, 1024)
    compares = config(algorithm={"correction": {"normalize": True}})
    plain = step_time(compares, arch, GPUS["h100"], load, dp=8)
    full = config(train={"tokens_per_microbatch": 8192, "recompute": "full"})
    assert plain.update == pytest.approx(3 * plain.old_logprobs)
    assert step_time(full, arch, GPUS["h100"], load, dp=8).update == pytest.approx(4 * plain.old_logprobs)
    selective = config(train={"tokens_per_microbatch": 8192, "recompute": "selective"})
    share = 2 * 36 * 3 * 4096 * 12288 / flops_per_token(arch, 2560)
    assert step_time(selective, arch, GPUS["h100"], load, dp=8).update == pytest.approx(
        (3 + share) * plain.old_logprobs
    )
    # Six operations per parameter and token, as everybody says; the input table multiplies nothing, attention does.
    assert 6 * model_parameters(arch) == pytest.approx(3 * flops_per_token(arch, 2560), rel=0.1)


@pytest.mark.parametrize("name", GPU_FILES)
def test_gpu_experiments_fit_their_nodes_of_80_gb(name: str) -> None:
    shape, nodes = GPU_FILES[name]
    settings, arch = load_config(CONFIGS / f"{name}.yaml"), Architecture.from_hf(shape)
    roles = node_roles(settings, Job(nodes, 8, 8))
    check_layout(settings, shape, roles.trainers * 8)
    dp = roles.trainers * 8 // settings.parallel.model_size
    load = Workload(
        settings.data.max_prompt_tokens,
        settings.rollout.max_tokens,
        settings.train.prompts_per_step * settings.algorithm.group_size,
    )
    for precision in settings.rollout.precisions:
        engine = engine_memory(settings, arch, 80e9, precision)
        assert gpu_total(settings, fullest_stage(settings, arch, load, dp), engine) < 80e9
        assert engine.cache > 16 * engine.per_token * load.response_tokens, "room for at least 16 longest responses"


def test_every_gpu_experiment_file_is_tried() -> None:
    files = {file.stem for file in CONFIGS.glob("qwen*.yaml")}
    assert files == set(GPU_FILES)


@pytest.mark.parametrize("name", GPU_FILES)
def test_a_gpu_experiment_says_how_many_nodes_it_needs(name: str) -> None:
    assert smallest_job(load_config(CONFIGS / f"{name}.yaml")) == Job(GPU_FILES[name][1], 8, 8)


@pytest.mark.parametrize(
    ("sections", "given", "job"),
    [
        ({}, (None, None), (1, 1)),
        ({"parallel": {"tp_size": 2}, "rollout": {"engines": 3}}, (None, None), (1, 4)),
        ({"parallel": {"dp_size": 24}}, (None, None), (3, 8)),
        ({"parallel": {"dp_size": 8}, "rollout": {"engines": 8, "placement": "separate"}}, (None, None), (2, 8)),
        ({"rollout": {"engines": 8, "placement": "separate"}}, (None, None), (2, 8)),
        ({"rollout": {"engines": 8}}, (None, 4), (2, 4)),
        ({}, (2, None), (2, 8)),
        ({}, (3, 2), (3, 2)),
        # What cannot fit is left to the checks.
        ({"parallel": {"tp_size": 16}}, (None, None), (1, 8)),
    ],
)
def test_nodes_and_gpus_that_are_not_given_follow_from_the_experiment(
    sections: dict, given: tuple[int | None, int | None], job: tuple[int, int]
) -> None:
    sections = {**sections, "rollout": {"max_tokens": 4096} | sections.get("rollout", {})}
    found = smallest_job(config(**sections), *given)
    assert (found.nodes, found.gpus_per_node, found.processes_per_node) == (*job, job[1])


SHAPES = """
import sys
from megatron_rl.cluster.model_shape import read_model_shape
from megatron_rl.config import load_config
for file in sys.argv[1:]:
    print(read_model_shape(load_config(file))["hidden_size"])
"""


def shapes(environment: dict[str, str], *files: Path) -> list[str]:
    """Widths of the models of experiments, looked up in a process of its own."""
    command = [sys.executable, "-c", SHAPES, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_gpu_experiment_is_planned_without_its_model_and_a_network(tmp_path: Path) -> None:
    found = shapes(hub_environment(tmp_path), *(CONFIGS / f"{name}.yaml" for name in GPU_FILES))
    assert found == [str(shape["hidden_size"]) for shape, _ in GPU_FILES.values()]


def test_a_model_of_the_hub_is_planned_by_its_config_alone(tmp_path: Path) -> None:
    model, file = tmp_path / "files", tmp_path / "own.yaml"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(QWEN3_8B | {"hidden_size": 17}))
    (model / "model.safetensors").write_text("not read")
    file.write_text("model: {path: Org/Name}\nrun_dir: r\n")
    with hub_server({"Org/Name": model}) as (endpoint, requests):
        assert shapes(hub_environment(tmp_path, endpoint), file) == ["17"]
        assert not [request for request in requests if "safetensors" in request]
    assert shapes(hub_environment(tmp_path), file) == ["17"], "it is kept"
    fill_cache(tmp_path, "Qwen/Qwen3-8B", model)
    assert shapes(hub_environment(tmp_path), CONFIGS / "qwen3-8b-history.yaml") == ["17"], "a copy here comes first"


def test_the_plan_names_every_part_and_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN25_7B))
    settings = load_config(CONFIGS / "qwen2.5-7b-grpo-8gpu.yaml", [f"model.path={tmp_path}"])
    plan(settings, Job(1, 8, 8), "h100", None, 1000)
    text = capsys.readouterr().out
    for word in (
        *("weights", "gradients", "optimizer", "activations", "logits", "engine", "at the peak", "micro-batches"),
        *("7.62 B parameters", "bubble", "15.2 GB to each engine", "512 + 1000 tokens", "limits the step"),
    ):
        assert word in text, word
    assert "does not fit" not in text
    tight = load_config(
        CONFIGS / "qwen2.5-7b-grpo-8gpu.yaml",
        [f"model.path={tmp_path}", "parallel.tp_size=1", "parallel.sequence_parallel=false"],
    )
    plan(tight, Job(1, 8, 8), "h100", None, None)
    assert "does not fit" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--gpu tpu"):
        plan(settings, Job(1, 8, 8), "tpu", None, None)
