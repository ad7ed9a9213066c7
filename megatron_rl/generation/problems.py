"""What a run asks and how it judges: read and checked before its engines start."""

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
class Problems:
    """The prompts of a run, and the processes that score responses to them: whoever takes them over closes `scorer`."""

    prompts: list[Prompt]
    """To train on."""
    heldout: dict[str, HeldoutSet]
    """By their entries in `data.eval`."""
    scorer: Scorer


def read_problems(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Problems:
    """Read all prompt sets, start the reward's processes, and leave out what the reward cannot judge.

    The same files and the same reward give the same prompts, so a resumed run goes on in the same order.

    Raises:
        ConfigError: when a set or the reward cannot be used.
    """
    data = config.data
    prompts = load_prompts(data.train, data, tokenizer, data.split, heldout=False)
    heldout = {spec: load_set(spec, config, tokenizer) for spec in data.eval}
    scorer = Scorer(config.reward, config.rollout.max_tokens)
    try:
        prompts = readable(prompts, scorer, "data.train", data.train, data.max_left_out)
        heldout = {spec: with_readable_answers(each, spec, config, scorer) for spec, each in heldout.items()}
    except BaseException:
        scorer.close()
        raise
    return Problems(prompts, heldout, scorer)
