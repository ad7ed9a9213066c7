"""What a checkpoint says of the experiment that wrote it, and what may have changed when it goes on."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from megatron_rl.config import Config, ConfigError
from megatron_rl.data.prompts import Prompt
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_mapping import hf_shapes
from megatron_rl.observability.console import Console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "experiment"
"""Name of the record among the states of a checkpoint."""
ORDER_KEYS = ("data.seed", "train.prompts_per_step")
"""Which decide, with the prompts themselves, what the prompts of a step are."""
UNIMPORTANT = ("run_dir", "checkpoint.resume")
"""Keys whose changes are not told."""


@dataclass(frozen=True)
class RunRecord:
    """What has to be the same for a run to go on where its checkpoint is, and its whole config for comparison."""

    config: dict[str, Any]
    """By dotted keys."""
    prompts: int
    """Training prompts."""
    data: str
    """Digest of the training prompts in their order: ids, texts, answers and demonstrations."""
    model: str
    """Digest of the shapes of the weights, and of what the token ids mean."""

    @classmethod
    def of(
        cls, config: Config, prompts: list[Prompt], tokenizer: "PreTrainedTokenizerBase", arch: Architecture
    ) -> "RunRecord":
        """The record of an experiment with these training prompts."""
        columns = ([each.prompt_id, each.text, each.answer, each.response_text] for each in prompts)
        model = [sorted(hf_shapes(arch).items()), sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id]
        return cls(_flat(config), len(prompts), _digest(columns), _digest(model))

    def changes(self, now: "RunRecord") -> list[str]:
        """One line for every key that has another value now; keys that only one version has do not count."""
        both = [key for key in self.config if key in now.config and not key.startswith(UNIMPORTANT)]
        return [
            f"{key}: {_shown(self.config[key])} -> {_shown(now.config[key])}"
            for key in both
            if self.config[key] != now.config[key]
        ]

    def conflicts(self, now: "RunRecord") -> list[str]:
        """What has changed with which going on cannot be meant, in words."""
        found = []
        if self.model != now.model:
            found.append(f"the shapes or token ids of model.path={now.config['model.path']!r} are others")
        if self.data != now.data:
            found.append(
                f"data.train={now.config['data.train']!r} holds other prompts ({self.prompts} then, {now.prompts} now)"
            )
        for key in ORDER_KEYS:
            if self.config[key] != now.config[key]:
                found.append(f"{key} was {_shown(self.config[key])} and is {_shown(now.config[key])}")
        return found


def check_resumed(saved: Mapping[str, Any] | None, now: RunRecord, step: int, force: bool, console: Console) -> None:
    """Tell what has changed since the checkpoint, and refuse what would put the run into the middle of another order.

    Args:
        saved: the record in the checkpoint; None: an older version wrote it.
        now: of the experiment that goes on.
        step: of the checkpoint.
        force: go on whatever has changed (`checkpoint.resume=force`).
        console: gets one line per changed key.

    Raises:
        ConfigError: naming what has changed, without `force`.
    """
    if saved is None:
        console.info("the checkpoint does not say what its run was like, so nothing is compared")
        return
    then = RunRecord(**saved)
    for line in then.changes(now):
        console.info(f"changed since step {step}: {line}")
    conflicts = then.conflicts(now)
    if conflicts and not force:
        raise ConfigError(
            f"the checkpoint of step {step} in run_dir={now.config['run_dir']!r} cannot go on: {'; '.join(conflicts)}; "
            "set it back, choose another run_dir, or set checkpoint.resume=force to go on nevertheless."
        )
    for conflict in conflicts:
        console.info(f"checkpoint.resume=force: {conflict}")


def _flat(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Plain values by dotted keys. What may be null or has keys of its own choice is one value."""
    flat: dict[str, Any] = {}
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel) and field.annotation is type(value):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = section.model_dump(mode="json", include={key})[key]
    return flat


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _digest(items: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(json.dumps(item).encode() + b"\n")
    return digest.hexdigest()
