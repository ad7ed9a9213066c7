"""GRPO by TRL on a file of prompts; started by `bench_vs_trl.py` in TRL's own environment.

The JSON file that it writes has, for each step, `seconds`, `tokens` (mean length of the responses) and `reward`.
"""

import argparse
import importlib
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

ROOT = Path(__file__).resolve().parents[1]


def reward_function(name: str) -> Any:
    """The built-in reward, without its packages' own imports: this environment lacks some of them."""
    for package in ("megatron_rl", "megatron_rl.rewards"):
        bare = types.ModuleType(package)
        bare.__path__ = [str(ROOT / package.replace(".", "/"))]
        sys.modules[package] = bare
    score = importlib.import_module("megatron_rl.rewards.builtin").BUILTIN[name]

    def reward(prompts: list[str], completions: list[str], answer: list[str], **others: Any) -> list[float]:
        return [score(*case) for case in zip(prompts, completions, answer, strict=True)]

    return reward


class Timer(TrainerCallback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def main() -> None:
    """Train and write what each step took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=Path)
    settings = json.loads(parser.parse_args().settings.read_text())
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    rows = settings["prompts"]
    for row in rows:
        if tokenizer(row["prompt"])["input_ids"] != row.pop("token_ids"):
            raise SystemExit(f"TRL would read other tokens from the prompt {row['prompt']!r}.")
    responses = settings["prompts_per_step"] * settings["group_size"]
    timer = Timer()
    trainer = GRPOTrainer(
        model=settings["model"],
        processing_class=tokenizer,
        reward_funcs=reward_function(settings["reward"]),
        train_dataset=Dataset.from_list(rows),
        callbacks=[timer],
        args=GRPOConfig(
            output_dir=settings["output"],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            max_steps=settings["steps"],
            per_device_train_batch_size=responses // settings["microbatches"],
            gradient_accumulation_steps=settings["microbatches"],
            num_generations=settings["group_size"],
            max_completion_length=settings["max_tokens"],
            temperature=settings["temperature"],
            learning_rate=settings["lr"],
            lr_scheduler_type="constant",
            weight_decay=settings["weight_decay"],
            adam_beta1=settings["betas"][0],
            adam_beta2=settings["betas"][1],
            max_grad_norm=settings["clip_grad"],
            beta=0.0,
            top_k=0,
            seed=settings["seed"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "completions/mean_length" in log]
    steps = [
        {"seconds": seconds, "tokens": log["completions/mean_length"], "reward": log["reward"]}
        for seconds, log in zip(timer.seconds, logs, strict=True)
    ]
    Path(settings["result"]).write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
