"""The prompts of a run and what judges responses to them: read and checked before the engines start."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rl.config import Config
from megatron_rl.data.prompts import Prompt, load_prompts
from megatron_rl.evaluation.evaluator import HeldoutSet, load_set, with_readable_answers
from megatron_rl.rewards.admission import readable
from megatron_rl.rewards.score import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptSets:
    """What a run trains on and is evaluated on."""

    train: list[Prompt]
    heldout: dict[str, HeldoutSet]
    """By the entries of `data.eval`."""
    scorer: Scorer
    """Of the section `reward`; whoever takes the sets over closes it."""


def read_sets(config: Config, tokenizer: "PreTrainedTokenizerBase") -> PromptSets:
    """Read `data.train` and all of `data.eval`, start the reward's processes, and leave out what it cannot judge.

    The same files and the same reward give the same prompts, so a resumed run goes on in the same order.

    Raises:
        ConfigError: when a set or the reward cannot be used.
    """
    data = config.data
    train = load_prompts(data.train, data, tokenizer, data.split, heldout=False)
    heldout = {spec: load_set(spec, config, tokenizer) for spec in data.eval}
    scorer = Scorer(config.reward, config.rollout.max_tokens)
    try:
        train = readable(train, scorer, "data.train", data.train, data.max_left_out)
        heldout = {spec: with_readable_answers(each, spec, config, scorer) for spec, each in heldout.items()}
    except BaseException:
        scorer.close()
        raise
    return PromptSets(train, heldout, scorer)
