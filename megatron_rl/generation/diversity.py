"""How different the responses to one prompt are: what exploration has left to choose from."""

from collections.abc import Sequence

from megatron_rl.metrics import Metrics
from megatron_rl.rewards.last_number import last_number, number_text
from rollout.types import Rollout

_BOX = "\\boxed"


def group_diversity(rollouts: Sequence[Rollout], texts: Sequence[str], group_size: int) -> Metrics:
    """Different responses, and different answers, by the size of a group; means over the groups, 1 / size to 1.

    Args:
        rollouts: groups of `group_size`, one after the other.
        texts: their texts.
    """
    starts = range(0, len(rollouts), group_size)
    responses = sum(len({tuple(rollout.token_ids) for rollout in rollouts[i : i + group_size]}) for i in starts)
    answers = sum(len({final_answer(text) for text in texts[i : i + group_size]}) for i in starts)
    return {
        "group/distinct_responses": responses / len(rollouts),
        "group/distinct_answers": answers / len(rollouts),
    }


def final_answer(text: str) -> str:
    """What a response ends in: its last box and what follows, else its last number, else all of it."""
    if _BOX in text:
        return text[text.rindex(_BOX) :].strip()
    number = last_number(text)
    return text.strip() if number is None else number_text(number)
