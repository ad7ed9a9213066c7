"""The responses to one prompt of a step."""

from dataclasses import dataclass, field

from megatron_rl.data.prompts import Prompt
from megatron_rl.rewards.score import Score
from rollout.types import Rollout, RolloutRequest


@dataclass
class Group:
    """The responses to one prompt of a step."""

    prompt: Prompt
    requests: list[RolloutRequest]
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    """Those that are finished, by their sample index."""
    scores: list[Score] = field(default_factory=list)
    """In the order of `requests`, when they are known."""

    @property
    def teaches(self) -> bool:
        """Whether the rewards differ; penalties do not count (DAPO compares right and wrong)."""
        return len({score.value for score in self.scores}) > 1


def visit(item: RolloutRequest | Rollout) -> tuple[str, int]:
    """What the responses of a group have in common: a step may visit a prompt in two epochs."""
    return item.prompt_id, item.epoch
