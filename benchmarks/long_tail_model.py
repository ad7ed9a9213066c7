"""Makes a 56 M parameter model and an EAGLE head for `bench_long_tail.py`, from nothing, in an hour on two cores.

    python benchmarks/long_tail_model.py
    python benchmarks/bench_long_tail.py --model runs/long-tail/hf --drafter runs/long-tail/drafter \\
        --data runs/long-tail/problems.jsonl

The model learns to go on calculating with a number, one operation after the other: `00317:+7=00324,*2=00648,...`. Which
operation comes next is anyone's guess, the rest of a line follows from it, so that its text has about the surprise per
token of a reasoning model's. A demonstration is as long as the longest response of the benchmark: no response there has
to go on after its end.
"""

import argparse
import json
import random
from pathlib import Path

import yaml

from _common import run_command

MODULUS = 100_000
LINES = 25
LONGEST = 9 * LINES + 1  # tokens: nine of every line, and the end
DOUBLING_SHARE = 0.3
SCRATCH = {
    "hidden_size": 640,
    "layers": 12,
    "heads": 10,
    "kv_heads": 2,
    "head_dim": 64,
    "ffn_hidden_size": 1920,
    "max_positions": 512,
}


def write_problems(file: Path, count: int) -> None:
    """JSON lines with prompt, answer (the last number) and response, the same in every call."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            number = draw.randrange(MODULUS)
            prompt, lines = f"{number:05d}:", []
            for _ in range(LINES):
                added = draw.randint(1, 9)
                doubles = draw.random() < DOUBLING_SHARE
                number = (number * 2 if doubles else number + added) % MODULUS
                lines.append(f"{'*2' if doubles else f'+{added}'}={number:05d},")
            record = {"prompt": prompt, "answer": f"{number:05d}", "response": "".join(lines)}
            out.write(json.dumps(record) + "\n")


def write_configs(folder: Path, problems: Path, steps: int, precision: str) -> tuple[Path, Path]:
    """The experiment files of the base model and of the head's warm-up."""
    data = {"train": str(problems), "eval": [], "max_prompt_tokens": 32}
    sft = {
        "model": {"path": str(folder / "scratch"), "precision": precision, "scratch": SCRATCH},
        "data": data,
        "train": {
            "steps": steps,
            "prompts_per_step": 8,
            "tokens_per_microbatch": 2048,
            "lr": 1.0e-3,
            "min_lr_ratio": 0.05,
            "lr_schedule": "linear",
            "warmup_steps": 20,
        },
        "rollout": {"max_tokens": LONGEST},
        "run_dir": str(folder),
    }
    warmup = {
        "model": {"path": str(folder / "hf"), "precision": precision},
        "data": data,
        "train": {"prompts_per_step": 16, "tokens_per_microbatch": 2048},
        "algorithm": {"group_size": 8},
        "rollout": {
            "max_tokens": LONGEST,
            "speculation": {"adaptive": "thompson", "drafters": ["eagle"]},
            "vllm": {"enforce_eager": True},
        },
        "drafter": {"unroll": 7, "lr": 1.0e-3, "tokens_per_slice": 512},
        "run_dir": str(folder),
    }
    files = folder / "sft.yaml", folder / "warmup.yaml"
    for file, content in zip(files, (sft, warmup), strict=True):
        file.write_text(yaml.safe_dump(content, sort_keys=False))
    return files


def main() -> None:
    """Train both by the product's own commands; what is already there is not made again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/long-tail"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=250, help="of 8 demonstrations (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=225, help="of the head (default: %(default)s)")
    parser.add_argument("--precision", default="bf16", help="fp32 or bf16 (default: %(default)s)")
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True, exist_ok=True)
    problems = flags.folder / "problems.jsonl"
    write_problems(problems, 20_000)
    sft, warmup = write_configs(flags.folder, problems, flags.steps, flags.precision)
    if not (flags.folder / "hf" / "config.json").exists():
        run_command("sft", "-c", str(sft))
    run_command("drafter", "warmup", "-c", str(warmup), "--updates", str(flags.updates), "--batches", "1")


if __name__ == "__main__":
    main()
