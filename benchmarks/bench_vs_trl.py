"""The demo's GRPO by TRL and by this project, plain and accelerated, on this machine's CPU.

    python benchmarks/bench_vs_trl.py [--quick] [--json FILE]

Three runs from the same weights (`make demo` makes the base model), with the same prompts in the same order, group
size, longest response, reward, optimizer and precision. TRL runs in an environment of its own, which the first call
makes in `build/trl` (packages of `TRL`, about 1 GB), and generates with transformers, in one process with all cores:
it has no vLLM on a CPU. This project's trainers are two data-parallel processes, which suit two cores better than the
demo's two pipeline stages. `plain` has no speculation and no history; `accelerated` has the demo's drafters and the
responses of the epoch before as lenient drafts.

Seconds are medians over the steps from the second epoch on, when history has something to reuse. Lengths and rewards
are means over the same steps: runs learn at their own pace, so tokens per second are there beside seconds per step.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from _common import ROOT, finish, parse_training_arguments, run_benchmark, run_command, training_parser
from megatron_rl.config import Config, ConfigError, load_config
from megatron_rl.data.order import PromptOrder
from megatron_rl.data.prompts import Prompt, load_prompts
from megatron_rl.observability.metrics_logger import read_metrics

TRL = ["torch==2.13.0", "transformers==5.19.0", "datasets==5.2.0", "accelerate==1.15.0", "trl==1.16.0"]
ENVIRONMENT = ROOT / "build" / "trl"
VARIANTS = {
    "plain": ["rollout.speculation.adaptive=off"],
    "accelerated": ["rollout.history={mode: lenient, lenience: 0.5}"],
}
PROMPTS, SHORT, FULL = 64, 6, 16  # prompts of the demo, and steps of a run
MICROBATCHES = 4
LAYOUT = ["parallel.pp_size=1", "parallel.dp_size=2"]


@dataclass(frozen=True)
class Run:
    """Means and medians from the second epoch on."""

    step: float
    """Median seconds."""
    length: float
    """Mean tokens of a response."""
    reward: float

    def row(self, name: str, responses: int) -> dict[str, float | str]:
        """A line of the table."""
        return {
            "system": name,
            "step [s]": self.step,
            "tokens/s": responses * self.length / self.step,
            "length": self.length,
            "reward": self.reward,
        }


def make_environment() -> Path:
    """The Python of TRL's environment, made when it is missing."""
    python = ENVIRONMENT / "bin" / "python"
    made = ENVIRONMENT / "made-of.txt"
    if not made.is_file() or made.read_text().split() != TRL:
        print(f"making an environment for TRL in {ENVIRONMENT} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TRL], check=True)
        made.write_text("\n".join(TRL))
    return python


def train_with_trl(python: Path, config: Config, prompts: list[Prompt], work: Path, skip: int) -> Run:
    """TRL's run."""
    train, algorithm = config.train, config.algorithm
    order = PromptOrder(len(prompts), train.prompts_per_step, config.data.seed)
    visited = [prompts[index] for step in range(train.steps) for index, _ in order.indices(step)]
    settings = {
        "model": config.model.path,
        "prompts": [{"prompt": p.text, "answer": p.answer, "token_ids": p.token_ids} for p in visited],
        "reward": config.reward.name,
        "group_size": algorithm.group_size,
        "prompts_per_step": train.prompts_per_step,
        "steps": train.steps,
        "microbatches": MICROBATCHES,
        "max_tokens": config.rollout.max_tokens,
        "temperature": config.rollout.temperature,
        "lr": train.lr,
        "weight_decay": train.weight_decay,
        "betas": [train.adam_beta1, train.adam_beta2],
        "clip_grad": train.clip_grad,
        "seed": train.seed,
        "output": str(work / "trl"),
        "result": str(work / "trl.json"),
    }
    (work / "settings.json").write_text(json.dumps(settings))
    # A model on the disk is all it needs: without this it asks the hub about it.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("_trl_grpo.py")
    subprocess.run([python, script, work / "settings.json"], check=True, env=environment)
    steps = json.loads((work / "trl.json").read_text())[skip:]
    return Run(
        statistics.median(step["seconds"] for step in steps),
        statistics.fmean(step["tokens"] for step in steps),
        statistics.fmean(step["reward"] for step in steps),
    )


def train_with_ours(config_file: str, overrides: list[str], run_dir: Path, skip: int) -> Run:
    """A run of this project."""
    shutil.rmtree(run_dir, ignore_errors=True)
    run_command("train", "-c", config_file, *overrides, f"run_dir={run_dir}")
    steps = [record for record in read_metrics(run_dir) if record["step"] > skip]
    return Run(
        statistics.median(step["time/step"] for step in steps),
        statistics.fmean(step["response/length_mean"] for step in steps),
        statistics.fmean(step["reward/mean"] for step in steps),
    )


def main() -> None:
    """Train, compare, report."""
    flags = parse_training_arguments(training_parser(__doc__, "fewer steps", "runs/bench-vs-trl"))
    overrides = [
        *LAYOUT,
        f"data.arithmetic.train_size={PROMPTS}",
        f"train.steps={SHORT if flags.quick else FULL}",
        "eval={every: 0, samples: 0}",
        "checkpoint={every: 0, export_hf: false}",
        "track.report=false",
        *flags.override,
    ]
    config = load_config(flags.config, overrides)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    prompts = load_prompts(config.data.train, config.data, tokenizer, config.data.split, heldout=False)
    epoch = math.ceil(len(prompts) / config.train.prompts_per_step)
    if epoch >= config.train.steps:
        raise ConfigError(f"train.steps={config.train.steps} has no second epoch of {len(prompts)} prompts; raise it.")
    flags.work.mkdir(parents=True, exist_ok=True)
    runs = {"TRL": train_with_trl(make_environment(), config, prompts, flags.work, epoch)}
    for name, changes in VARIANTS.items():
        runs[name] = train_with_ours(flags.config, [*overrides, *changes], flags.work / name, epoch)
    ratios = {f"{name}_vs_trl_step": runs["TRL"].step / runs[name].step for name in VARIANTS}
    responses = config.train.prompts_per_step * config.algorithm.group_size
    finish(flags, ratios, [run.row(name, responses) for name, run in runs.items()])


if __name__ == "__main__":
    run_benchmark(main)
