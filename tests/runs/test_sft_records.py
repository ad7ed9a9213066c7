"""A whole `sft` run on a file as people have it."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

from tests.launching import ROOT


def test_sft_imitates_messages_and_leaves_out_what_cannot_be_used(tmp_path: Path) -> None:
    chats = [
        {"prompt": [{"role": "user", "content": f"{i}+1?"}], "completion": [{"role": "assistant", "content": f"={i}"}]}
        for i in range(30)
    ]
    null = {"prompt": [{"role": "user", "content": None}], "completion": "x"}
    too_long = {"prompt": "q", "completion": "r" * 62}  # with the end of the sequence, one more than the model takes
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*chats, null, too_long, chats[0] | {"prompt": "b"}]))
    config = {
        "model": {
            "path": str(tmp_path / "model"),
            "precision": "fp32",
            "scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "max_positions": 63},
        },
        "data": {"train": str(data), "response_key": "completion", "max_prompt_tokens": 40},
        "train": {"steps": 2, "prompts_per_step": 4, "tokens_per_microbatch": 2048},
        "rollout": {"max_tokens": 20},
        "run_dir": str(tmp_path / "run"),
    }
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "megatron_rl.cli", "sft", "-c", str(file)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert f"1 of 33 records left out (1 a chat message with null content: {data}:31)" in said
    assert "1 of 32 prompts left out (longer than data.max_prompt_tokens=40, or than 63 tokens with the" in said
    assert "indexing errors" not in said, "what is left out needs no warning of the tokenizer's"

    done = subprocess.run([*command, "data.max_left_out=0.01"], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "1 of 33 records cannot be used, and data.max_left_out=0.01 is the largest share" in done.stderr
