"""`megatron-rl data check` prints what a run would read, and ends as the run would."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rl.config import Config, ConfigError
from megatron_rl.data.check import check
from megatron_rl.models.scratch import character_tokenizer
from megatron_rl.observability.terminal import Terminal, standard_output
from tests.launching import ROOT

USER = [{"role": "user", "content": "1+1?"}]


def experiment(folder: Path, **data: Any) -> Config:
    scratch = {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1}
    model = {"path": str(folder / "model"), "scratch": scratch}
    return Config.model_validate(
        {"model": model, "run_dir": str(folder / "run"), "data": data, "train": {"tokens_per_microbatch": 2048}}
    )


def jsonl(folder: Path, *rows: Any) -> str:
    file = folder / "set.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(file)


def shown(name: str, config: Config, purpose: str = "train", count: int = 3) -> str:
    text = io.StringIO()
    terminal: Terminal = standard_output(text)
    check(name, config, purpose, count, terminal)
    return text.getvalue()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "megatron_rl.cli", "data", "check", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)


def numbers(text: str, row: str) -> list[str]:
    """The numbers of a row of a table."""
    (line,) = [line for line in text.splitlines() if re.match(rf"│ {row} +│", line)]
    return re.findall(r"│ +(\d+) (?=│)", line)


def test_counts_lengths_and_records_left_out_are_those_of_a_run(tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": "x" * (10 * (i + 1)), "answer": "1"} for i in range(12)]
    text = shown(jsonl(tmp_path, *rows, "{"), experiment(tmp_path, max_prompt_tokens=110, max_left_out=0.1))
    assert [numbers(text, row) for row in ("read", "used", "left out", "too long")] == [["13"], ["11"], ["1"], ["1"]]
    assert numbers(text, "prompt") == ["10", "60", "100", "110", "110"]
    assert re.search(r"set\.jsonl:13 │ not a JSON object │ Expecting property name", text)
    assert re.search(r"set\.jsonl:12 │ too long +│ 120 tokens", text)


def test_records_are_shown_as_the_model_sees_them(tmp_path: Path) -> None:
    name = jsonl(tmp_path, {"id": "a", "prompt": USER, "answer": "[red]2", "response": "=2"}, *[{"prompt": "b"}] * 9)
    config = experiment(tmp_path, max_left_out=1)
    assert "\na: 22 tokens, of " in (text := shown(name, config))
    assert "\nuser: 1+1?\nassistant: <<< the prompt ends here >>>\n" in text and "answer '[red]2'" in text
    imitated = shown(name, config, "sft")
    assert "\nassistant: <<< the prompt ends here >>>=2<eos><<< the demonstration ends here >>>\n" in imitated
    assert numbers(imitated, "demonstration") == ["2"] * 5
    assert "ends here" not in shown(name, config, count=0)


def test_control_characters_of_data_do_not_reach_the_terminal(tmp_path: Path) -> None:
    rows = [
        {"id": "a\u001b[31m", "prompt": "b\u009bc\u202e", "answer": "1"},
        '{"\udc00": "\\ud800", "prompt": "\\ud800"}',
    ]
    file = tmp_path / "set.jsonl"
    file.write_bytes(
        "".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in rows).encode(
            "utf-8", "surrogatepass"
        )
    )
    text = shown(str(file), experiment(tmp_path, max_left_out=1))
    assert "a\\x1b[31m: 4 tokens" in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert "the tokenizer has <unk> in their place" in text


def test_a_set_that_a_run_refuses_is_printed_and_refused(tmp_path: Path) -> None:
    text = io.StringIO()
    name = jsonl(tmp_path, {"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": ""})
    with pytest.raises(ConfigError, match=r"1 of 2 records cannot be used, and data\.max_left_out=0\.05 is"):
        check(name, experiment(tmp_path), "train", 3, standard_output(text))
    assert "empty answer" in text.getvalue() and "the prompt ends here" in text.getvalue()
    with pytest.raises(ConfigError, match=r"data\.eval='.*set\.jsonl': 1 of 2"):
        check(name, experiment(tmp_path), "eval", 3, standard_output(text))


def test_public_sets_and_the_limits_of_the_model_are_known(tmp_path: Path) -> None:
    name = jsonl(tmp_path, {"question": "How many?", "answer": "so #### 72"})
    assert "user: How many?\n\nPlease reason" in shown(f"gsm8k={name}", experiment(tmp_path), "eval")
    folder = tmp_path / "model"
    character_tokenizer(64).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8}
    more = {"intermediate_size": 16, "vocab_size": 100, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(sizes | more))
    name = jsonl(tmp_path, *({"prompt": "ppp", "response": "r" * n} for n in (4, 5)))
    assert numbers(shown(name, experiment(tmp_path), "sft"), "too long") == ["1"]


def test_the_command_prints_it_and_exits_with_2_where_a_run_would(tmp_path: Path) -> None:
    config = tmp_path / "experiment.yaml"
    config.write_text(yaml.safe_dump(experiment(tmp_path).model_dump(mode="json")))
    name = jsonl(tmp_path, {"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": float("nan")})
    done = command(name, "-c", str(config), "--records", "1")
    assert done.returncode == 2 and done.stderr.startswith(f"data.train='{name}': 1 of 2 records cannot be used")
    assert done.stderr.count("\n") == 1 and "the prompt ends here" in done.stdout
    done = command(name, "-c", str(config), "data.max_left_out=0.5")
    assert (done.returncode, done.stderr) == (0, "")
