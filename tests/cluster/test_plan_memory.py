"""The memory that `megatron-rl plan` expects, against what a small model allocates."""

import json
from pathlib import Path

import pytest

from tests.launching import run_workers
from tests.rollout.tiny_models import make_model

WORKER = "tests.cluster.memory_worker"
# DDP rounds its buffers up; Adam counts its steps; a few small tensors are kept beside the layers' activations.
TOLERANCE = {"weights": 0.0, "gradients": 0.01, "optimizer": 0.01, "activations": 0.02}


@pytest.mark.parametrize(
    ("family", "kv_heads", "precision", "tp", "pp", "processes"),
    [
        pytest.param("qwen3", 4, "fp32", 1, 1, 1, marks=pytest.mark.slow),
        pytest.param("qwen3", 2, "bf16", 1, 1, 1, marks=pytest.mark.slow),
        pytest.param("qwen2", 2, "fp32", 1, 1, 1, marks=pytest.mark.slow),
        pytest.param("qwen3", 2, "fp32", 2, 1, 2, marks=pytest.mark.slow),
        ("qwen3", 2, "bf16", 1, 2, 2),
        pytest.param("qwen2", 2, "bf16", 1, 1, 2, marks=pytest.mark.slow),
        ("qwen3_moe", 2, "bf16", 1, 1, 1),
    ],
)
def test_plan_expects_what_is_allocated(
    tmp_path: Path, family: str, kv_heads: int, precision: str, tp: int, pp: int, processes: int
) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    if family == "qwen3_moe":
        shape |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    model = make_model(tmp_path / "model", model_type=family, num_key_value_heads=kv_heads, **shape)
    run_workers(WORKER, processes, model, str(tp), str(pp), precision, tmp_path)
    for rank in range(processes):
        measured, expected = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for part, tolerance in TOLERANCE.items():
            assert measured[part] == pytest.approx(expected[part], rel=tolerance), (rank, part)
