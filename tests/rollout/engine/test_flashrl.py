"""The FLASHRL_* variables: a vLLM that knows nothing of this package but has it installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megatron_rl.config import ConfigError
from rollout.engine.flashrl import VARIABLES, DropIn
from tests.capabilities import require_int8
from tests.rollout.tiny_models import make_model

ROOT = Path(__file__).parents[3]
WORKER = [sys.executable, "-m", "tests.rollout.engine.flashrl_worker"]
BASE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class Process:
    """A worker that runs meanwhile."""

    def __init__(self, actions: list[str], **variables: str) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("FLASHRL_", "MEGATRON"))
        }
        environment |= BASE | {"PYTHONPATH": str(ROOT)} | variables
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([*WORKER, *actions], env=environment, cwd=ROOT, **pipes)  # type: ignore[call-overload]

    def result(self) -> dict[str, Any]:
        out, error = self.finish()
        assert self._process.returncode == 0, error[-3000:]
        return json.loads(out.splitlines()[-1])

    def finish(self) -> tuple[str, str]:
        return self._process.communicate(timeout=120)


def test_variables_that_are_unset_or_empty_ask_for_nothing() -> None:
    assert DropIn.from_environment({}) is None
    assert DropIn.from_environment(dict.fromkeys(VARIABLES, "")) is None


def test_bf16_asks_for_exact_logprobs_alone() -> None:
    settings = DropIn.from_environment({"FLASHRL_CONFIG": "bf16"})
    assert settings == DropIn("none", None, True, False, False, "INFO", None)


def test_a_float32_head_leaves_the_logprobs_mode_alone() -> None:
    settings = DropIn.from_environment({"FLASHRL_LMHEAD_FP32": "1"})
    assert settings is not None and settings.lm_head_fp32 and not settings.exact_logprobs


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FLASHRL_CONFIG", "int4", "FLASHRL_CONFIG is 'int4'; set it to bf16, fp8, int8 or the path"),
        ("FLASHRL_LMHEAD_FP32", "yes", "FLASHRL_LMHEAD_FP32 is 'yes'; set it to 1 or 0"),
        ("FLASHRL_TEST_RELOAD", "a,b", "FLASHRL_TEST_RELOAD is 'a,b'; set it to 1 or 0"),
        ("FLASHRL_LOGGING_LEVEL", "loud", "FLASHRL_LOGGING_LEVEL is 'loud'; set it to one of DEBUG"),
    ],
)
def test_a_wrong_value_is_one_sentence(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DropIn.from_environment({name: value})


def test_a_file_that_is_no_quantization_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "flash.yaml").write_text("configs: [{fn: int8}]")
    with pytest.raises(ConfigError, match=r"flash.yaml is not valid: quantization: Field required"):
        DropIn.from_environment({"FLASHRL_CONFIG": str(tmp_path / "flash.yaml")})


def test_a_log_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    settings = DropIn.from_environment({"FLASHRL_LOGGING_FILE": str(tmp_path / "none" / "log")})
    assert settings is not None
    with pytest.raises(ConfigError, match="FLASHRL_LOGGING_FILE is .* cannot be written"):
        settings.start_logging()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_model(tmp_path_factory.mktemp("a"), seed=2, spread=0.1), make_model(
        tmp_path_factory.mktemp("b"), seed=3
    )


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantization file that smooths one layer and leaves one out."""
    folder = tmp_path_factory.mktemp("calibrated")
    names = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    layers: dict[str, Any] = {f"model.layers.{i}.{name}": {} for i in (0, 1) for name in names}
    layers["model.layers.1.mlp.down_proj"] = {"skip": "the test says so"}
    content = {"quantization": "int8", "vectors": "int8.safetensors", "layers": layers}
    (folder / "int8.yaml").write_text(yaml.safe_dump(content))
    save_file({"model.layers.0.mlp.down_proj": torch.linspace(0.1, 3, 96)}, folder / "int8.safetensors")
    return folder / "int8.yaml"


@pytest.fixture(scope="module")
def results(
    models: tuple[Path, Path], calibrated: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What every kind of process gave; they run two at a time."""
    require_int8()
    model, other_model = models
    log = tmp_path_factory.mktemp("log") / "log"
    updates = ["generate", f"reload {other_model}", "generate", f"reload {model}", "generate"]
    updates += [f"transfer {other_model}", "generate", f"load {model}", "generate", f"transfer {model}", "generate"]
    int8 = {"FLASHRL_CONFIG": "int8"}
    logged = {"FLASHRL_CONFIG": str(calibrated), "FLASHRL_TEST_RELOAD": "1", "FLASHRL_LOGGING_FILE": str(log)}
    wanted: list[tuple[str, list[str], dict[str, str]]] = [
        ("absent", [str(model), "generate"], {"VLLM_PLUGINS": ""}),
        ("unset", [str(model), "generate"], {}),
        ("bf16", [str(model), "generate"], {"FLASHRL_CONFIG": "bf16"}),
        ("int8", [str(model), *updates], int8),
        ("other", [str(other_model), "generate"], int8),
        ("file", [str(model), "generate", f"reload {other_model}", "generate", "spoil", "check"], logged),
    ]
    found: dict[str, dict[str, Any]] = {"log": {"text": ""}}
    for pair in (wanted[:2], wanted[2:4], wanted[4:]):
        started = [(name, Process(actions, **variables)) for name, actions, variables in pair]
        found |= {name: process.result() for name, process in started}
    found["log"]["text"] = log.read_text()
    return found


@pytest.mark.slow
def test_without_variables_vllm_is_as_if_the_package_were_not_installed(results: dict[str, Any]) -> None:
    assert not results["unset"]["changed"]
    assert results["unset"]["results"] == results["absent"]["results"]


@pytest.mark.slow
def test_bf16_gives_the_logprobs_of_what_was_sampled_and_the_same_tokens(
    results: dict[str, Any], models: tuple[Path, Path]
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
    assert results["bf16"]["changed"]
    for stock, exact in zip(results["unset"]["results"][0], results["bf16"]["results"][0], strict=True):
        assert stock[:2] == exact[:2]
        prompt, tokens, logprobs = exact
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1] / 0.7
        kept = logits.masked_fill(logits < logits.topk(5).values[:, -1:], -torch.inf).log_softmax(-1)
        expected = kept[torch.arange(len(tokens)), torch.tensor(tokens)]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)
        assert (torch.tensor(stock[2]) - expected).abs().max() > 0.1


@pytest.mark.slow
def test_updates_by_vllms_own_ways_quantize_again(results: dict[str, Any]) -> None:
    first, _, reloaded, _, restored, _, sent, loaded, _, _, last = results["int8"]["results"]
    fresh = results["other"]["results"][0]
    assert first != results["bf16"]["results"][0]
    assert reloaded == fresh != first and sent == fresh
    assert restored == last == first
    assert loaded.startswith("ValueError: ") and "is quantized, so load_weights alone cannot change it" in loaded


@pytest.mark.slow
def test_a_quantization_file_says_which_layers_and_how(results: dict[str, Any]) -> None:
    first, _, other, *_ = results["file"]["results"]
    assert first != results["int8"]["results"][0] and other != results["other"]["results"][0]
    assert "model.layers.1.mlp.down_proj is not quantized: the test says so." in results["log"]["text"]


@pytest.mark.slow
def test_the_reload_is_tested_after_loading_and_fails_when_weights_change(results: dict[str, Any]) -> None:
    assert "loading the same weights again changed none of" in results["log"]["text"]
    verdict = results["file"]["results"][-1]
    assert verdict.startswith("RuntimeError: FLASHRL_TEST_RELOAD: loading the same weights again changed 2 of")


@pytest.mark.slow
def test_a_process_with_a_wrong_value_ends_with_the_sentence(models: tuple[Path, Path]) -> None:
    process = Process([str(models[0]), "generate"], FLASHRL_CONFIG="fp8")
    last_line = process.finish()[1].splitlines()[-1]
    assert "FLASHRL_CONFIG asks for fp8, which needs a GPU; use int8 or bf16." in last_line
