"""sbatch files: what is asked of Slurm, who gets which node, and what is refused."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_rl.cluster.slurm import Job, Nodes, node_roles, render
from megatron_rl.config import Config, ConfigError, load_config
from tests.test_cli import megatron_rl

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An experiment with a model folder, and a name that a shell would trip over."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE))
    values = {
        "model": {"path": str(tmp_path / "model")},
        "parallel": {"tp_size": 4},
        "train": {"prompts_per_step": 64, "tokens_per_microbatch": 8192},
        "rollout": {"engines": 4, "tp_size": 4},
        "run_dir": str(tmp_path / "my run"),
    }
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(values))
    return experiment


def variables(text: str) -> dict[str, str]:
    lines = [line for line in text.split("set -euo")[0].splitlines() if line and not line.startswith("#")]
    return {name: " ".join(shlex.split(value)) for name, _, value in (line.partition("=") for line in lines)}


def job(nodes: int, gpus: int = 8) -> Job:
    return Job(nodes, gpus, gpus)


def test_colocated_engines_share_all_nodes(file: Path) -> None:
    text = render(load_config(file), job(2), ["-c", str(file), "train.lr=1e-6"], Path("/work dir"))
    found = variables(text)
    assert (found["TRAINER_NODES"], found["PROCESSES"], found["RAY_WORKERS_FROM"]) == ("2", "8", "1")
    assert (found["GPUS"], found["HEAD_GPUS"]) == ("8", "8")
    assert found["WORKDIR"] == "/work dir"
    assert found["ARGUMENTS"] == f"(-c {file} train.lr=1e-6)"
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=8\n" in text
    assert "16 trainer processes (tp 4, pp 1, dp 4) on 2 nodes; 4 engine(s) of tp 4 beside them" in text


def test_engines_of_their_own_get_the_last_nodes_and_ray_has_no_gpu_of_a_trainer(file: Path) -> None:
    config = load_config(file, ["rollout.placement=separate", "rollout.engines=5"])
    assert node_roles(config, job(7)) == Nodes(trainers=4, engines=3)
    found = variables(render(config, job(7), [], Path("/w")))
    assert (found["TRAINER_NODES"], found["RAY_WORKERS_FROM"], found["HEAD_GPUS"]) == ("4", "4", "0")


def test_the_head_asks_for_requeue_signal_and_what_the_user_adds(file: Path) -> None:
    asked = Job(2, 8, 8, time="4:00:00", partition="gpu", account="lab", grace_s=900, options=("--qos=high",))
    head = [line for line in render(load_config(file), asked, [], Path("/w")).splitlines() if line.startswith("#SBA")]
    for option in (
        *("--requeue", "--signal=B:TERM@900", "--time=4:00:00", "--partition=gpu", "--account=lab", "--qos=high"),
        *("--gpus-per-node=8", "--exclusive", f"--output='{file.parent}/my run/slurm/%j.log'"),
    ):
        assert any(option in line for line in head), option


@pytest.mark.parametrize("nodes", [1, 2, 256])
def test_the_file_is_valid_bash(file: Path, nodes: int) -> None:
    config = load_config(file, ["rollout.engines=2", f"train.prompts_per_step={64 * nodes}"])
    text = render(config, job(nodes), ["-c", "a b.yaml", "run_dir='x'"], Path("/w"))
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize(
    ("overrides", "nodes", "gpus", "words"),
    [
        (["rollout.engines=5"], 2, 8, "rollout.engines=5 of rollout.tp_size=4 need 3 nodes of 8 GPUs"),
        (["rollout.placement=separate"], 2, 8, "leave none for the trainers"),
        (["rollout.placement=separate"], 2, 0, "rollout.placement=separate needs GPUs"),
        (["parallel.tp_size=4"], 2, 6, "parallel.tp_size=4 does not divide the 6 GPUs"),
        (
            ["parallel.pp_size=7", "rollout.engines=2"],
            1,
            8,
            "8 trainer processes cannot hold parallel.tp_size x pp_size x cp_size = 28",
        ),
        (["parallel.dp_size=3", "rollout.engines=2"], 2, 8, "parallel.dp_size=3"),
        (["train.prompts_per_step=1", "algorithm.group_size=2", "rollout.engines=2"], 8, 8, "train.prompts_per_step"),
        ([], 0, 8, "--nodes 0"),
    ],
)
def test_what_does_not_fit_is_one_sentence(file: Path, overrides: list[str], nodes: int, gpus: int, words: str) -> None:
    config: Config = load_config(file, overrides)
    with pytest.raises(ConfigError) as error:
        render(config, Job(nodes, gpus, gpus or 1), [], Path("/w"))
    assert words in str(error.value)


def test_the_command_writes_the_file_and_says_how_to_submit_it(file: Path) -> None:
    result = megatron_rl("launch", "slurm", "-c", str(file), "--nodes", "2", "train.lr=2e-6")
    assert result.returncode == 0, result.stderr
    written = file.parent / "my run" / "slurm" / "job.sbatch"
    assert result.stdout.splitlines()[-1] == f"sbatch {written}"
    assert "train.lr=2e-6" in written.read_text()
