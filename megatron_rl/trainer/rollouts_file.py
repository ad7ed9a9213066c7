"""Rollouts saved as JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config import ConfigError
from megatron_rl.trainer.batch import Batch
from rollout.types import Rollout

ROLLOUTS_FILE = "warmup-rollouts.jsonl"


def write_rollouts(rollouts: list[Rollout], file: Path) -> None:
    """Save rollouts so that `read_rollouts` can read them."""
    lines = [
        json.dumps({"prompt_ids": rollout.prompt_ids, "token_ids": rollout.token_ids}) + "\n" for rollout in rollouts
    ]
    file.write_text("".join(lines))


def read_rollouts(file: Path, vocab_limit: int) -> Batch:
    """Rollouts saved as JSON lines with `prompt_ids` and `token_ids`, lists of token ids below `vocab_limit`.

    They should be samples of the policy at `rollout.temperature`, or scores mean little.

    Raises:
        ConfigError: naming the line that cannot be used.
    """
    if not file.is_file():
        raise ConfigError(f"--rollouts {file} does not exist.")
    prompts, responses = [], []
    for number, line in _lines(file):
        try:
            record = json.loads(line)
            prompt, response = record["prompt_ids"], record["token_ids"]
            valid = all(0 <= token < vocab_limit for token in prompt + response) and prompt and response
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file}:{number} is not a rollout ({type(error).__name__}: {error}).") from None
        if not valid:
            raise ConfigError(
                f"{file}:{number}: prompt_ids and token_ids have to be token ids below {vocab_limit}, those that the "
                "tokenizer has, and neither may be empty."
            )
        prompts.append(prompt)
        responses.append(response)
    if not prompts:
        raise ConfigError(f"{file} holds no rollouts.")
    return Batch(prompts, responses)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line
