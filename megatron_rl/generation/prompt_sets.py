"""The prompts of a run, read before anything starts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rl.config import Config
from megatron_rl.data.prompts import Prompt, load_prompts
from megatron_rl.evaluation.evaluator import HeldoutSet, load_set

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptSets:
    """What a run trains on and is evaluated on."""

    train: list[Prompt]
    heldout: dict[str, HeldoutSet]
    """By the entries of `data.eval`."""


def read_sets(config: Config, tokenizer: "PreTrainedTokenizerBase") -> PromptSets:
    """Read `data.train` and all of `data.eval`.

    Raises:
        ConfigError: when a set cannot be used.
    """
    data = config.data
    train = load_prompts(data.train, data, tokenizer, data.split, heldout=False)
    return PromptSets(train, {spec: load_set(spec, config, tokenizer) for spec in data.eval})
