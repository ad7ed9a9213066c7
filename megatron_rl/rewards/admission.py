"""What a run finds out about its reward before it starts engines: references that it cannot read, and functions that
give no numbers."""

import logging
import re
from collections.abc import Callable, Sequence

from megatron_rl.config import ConfigError
from megatron_rl.data.prompts import Prompt
from megatron_rl.rewards.score import ScoreItem, Scorer

log = logging.getLogger(__name__)

NAMED = 10
"""So many records are named in a warning, the rest are counted."""
TRIED = 4
"""So many records a user's function is tried on."""
_INTEGER = re.compile(r"-?[0-9]{1,18}")


def readable(prompts: list[Prompt], scorer: Scorer, key: str, name: str) -> list[Prompt]:
    """The prompts whose references the reward can read; the others are named in the log once, here.

    A user's function is tried on the first prompts instead, each with its reference as the response.

    Args:
        prompts: a set, in its order.
        scorer: of its reward.
        key: the config key that names the set.
        name: the set.

    Raises:
        ConfigError: when the reward can read no reference, and when a function returns something that is not a number.
    """
    if scorer.reward.function is not None:
        _try_function(prompts[:TRIED], scorer)
        return prompts
    reasons = _unreadable(prompts, scorer)
    if not reasons:
        return prompts
    kept = [prompt for prompt in prompts if prompt.answer not in reasons]
    lost = [prompt for prompt in prompts if prompt.answer in reasons]
    if not kept:
        raise ConfigError(
            f"reward.name={scorer.reward.name} can read none of the {len(prompts)} reference answers of {key}={name!r} "
            f"({lost[0].prompt_id}: {reasons[lost[0].answer]}); choose another reward, or mend data.answer_key."
        )
    more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
    log.warning(
        "%s: %d of %d prompts left out, since reward.name=%s cannot read their reference answers: %s%s",
        name,
        len(lost),
        len(prompts),
        scorer.reward.name,
        ", ".join(f"{prompt.prompt_id} ({_shown(prompt.answer)})" for prompt in lost[:NAMED]),
        more,
    )
    return kept


def _unreadable(prompts: Sequence[Prompt], scorer: Scorer) -> dict[str, str]:
    """The reference answers that the reward cannot read, with the reasons."""
    if scorer.reward.name == "exact":
        return {}
    # Whole numbers, of which many sets have nothing else, are read by numeric and math in any case.
    plain: Callable[[str], object] = _INTEGER.fullmatch if scorer.reward.name != "choice" else lambda answer: False
    answers = list(dict.fromkeys(prompt.answer for prompt in prompts if not plain(prompt.answer)))
    scores = scorer.attempt([ScoreItem("", "", answer, 0, "") for answer in answers])
    return {answer: score.error for answer, score in zip(answers, scores, strict=True) if score.error is not None}


def _shown(answer: str) -> str:
    text = " ".join(answer.split())
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _try_function(prompts: Sequence[Prompt], scorer: Scorer) -> None:
    """Until it gives a number. Raising is allowed: the response then counts 0."""
    name = f"reward.function={scorer.reward.function!r}"
    for prompt in prompts:
        (score,) = scorer.attempt([ScoreItem(prompt.text, prompt.answer, prompt.answer, 0, prompt.prompt_id)])
        if score.not_a_number:
            raise ConfigError(
                f"{name}: {score.error}, for the record {prompt.prompt_id}; return a number, or a dict with one as "
                "`score`."
            )
        if score.error is None:
            return
        log.warning("%s fails on the record %s: %s", name, prompt.prompt_id, score.error)
