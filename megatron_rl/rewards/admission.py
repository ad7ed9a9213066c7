"""What a run finds out about its reward before it starts engines: references that it cannot read, and functions that
give no numbers."""

import logging
import re
from collections.abc import Callable, Sequence

from megatron_rl.config import ConfigError
from megatron_rl.data.intake import Intake, LeftOut, printable
from megatron_rl.data.prompts import Prompt
from megatron_rl.rewards.score import ScoreItem, Scorer

log = logging.getLogger(__name__)

SHOWN = 60
"""Characters of a reference in a message."""
TRIED = 4
"""So many records a user's function is tried on."""
_INTEGER = re.compile(r"-?[0-9]{1,18}")


def readable(prompts: list[Prompt], scorer: Scorer, key: str, name: str, max_left_out: float) -> list[Prompt]:
    """The prompts whose references the reward can read; the others are named in the log once, here.

    A user's function is tried on the first prompts instead, each with its reference as the response.

    Args:
        prompts: a set, in its order.
        scorer: of its reward.
        key: the config key that names the set.
        name: the set.
        max_left_out: share in [0, 1] of the prompts that may be left out, `data.max_left_out`.

    Raises:
        ConfigError: when more are left out, or all; when a function returns something that is not a number.
    """
    if scorer.reward.function is not None:
        _try_function(prompts[:TRIED], scorer)
        return prompts
    intake = Intake(name, key, "data.max_left_out", max_left_out)
    intake.total = len(prompts)
    unreadable = _unreadable(prompts, scorer)
    reason = f"with an answer that reward.name={scorer.reward.name} cannot read"
    intake.left_out = [
        LeftOut(f"{prompt.prompt_id} ({printable(prompt.answer, SHOWN)!r})", reason, unreadable[prompt.answer])
        for prompt in prompts
        if prompt.answer in unreadable
    ]
    intake.conclude()
    return [prompt for prompt in prompts if prompt.answer not in unreadable]


def _unreadable(prompts: Sequence[Prompt], scorer: Scorer) -> dict[str, str]:
    """The reference answers that the reward cannot read, with the reasons."""
    if scorer.reward.name == "exact":
        return {}
    # Whole numbers, of which many sets have nothing else, are read by numeric and math in any case.
    plain: Callable[[str], object] = _INTEGER.fullmatch if scorer.reward.name != "choice" else lambda answer: False
    answers = list(dict.fromkeys(prompt.answer for prompt in prompts if not plain(prompt.answer)))
    scores = scorer.attempt([ScoreItem("", "", answer, 0, "") for answer in answers])
    return {answer: score.error for answer, score in zip(answers, scores, strict=True) if score.error is not None}


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
