"""The trained EAGLE head as a drafter: how vLLM is told of it, and what the scheduler knows of it.

vLLM's proposer runs the head in the workers, after every step, and drafts for the next one.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_rl.config import Config, ConfigError
from rollout.speculation.bandit import EAGLE, Arm

if TYPE_CHECKING:
    from vllm.v1.outputs import DraftTokenIds
    from vllm.v1.request import Request

RESTS = -1  # `SchedulerOutput.num_spec_tokens_to_schedule`: the head does not run in this step, see `vllm_patch`
LINGER = 8  # steps for which the head follows the requests after its drafts were last used
TOKENS_PER_ROW = 4  # tokens that must have been generated for each one that is computed anew


def kind_of(folder: str | Path) -> Literal["eagle3", "eagle"]:
    """The form of the head in a folder in vLLM's format. Raises ConfigError when there is none."""
    file = Path(folder) / "config.json"
    try:
        architectures = json.loads(file.read_text()).get("architectures") or [""]
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} holds no EAGLE head (config.json is missing); give the folder of a trained one as drafter.path."
        ) from None
    return "eagle3" if "Eagle3" in architectures[0] else "eagle"


def head_arguments(config: Config, folder: str | None) -> dict[str, Any]:
    """vLLM's `speculative_config` for the head in `folder` (None: `drafter.path`).

    Raises ConfigError when there is no folder, no head in it, or one of another `drafter.kind`.
    """
    folder = folder or config.drafter.path
    if folder is None:
        raise ConfigError(
            "rollout.speculation.drafters names eagle, but there is no head: set drafter.path to the folder of a "
            "trained one, or leave eagle out."
        )
    if (kind := kind_of(folder)) != config.drafter.kind:
        raise ConfigError(f"{folder} holds an {kind} head, but drafter.kind={config.drafter.kind}; change one of them.")
    return {
        "method": kind,
        "model": folder,
        # The policy may start with random weights, which the trainer replaces; nobody replaces the head's.
        "draft_load_config": {"load_format": "auto"},
    }


class HeadDrafts:
    """What the head has drafted, and whether it has seen all that the running requests hold.

    The head keeps keys and values of the tokens that it has seen, in the policy's blocks. Where its drafts do not pay
    it rests, which leaves holes there: later drafts would be worse, and the head be judged by them. So once it has
    rested it is `behind`, and before it drafts again all blocks are dropped and the running requests computed anew.
    """

    def __init__(self) -> None:
        self.behind = False
        self.emitted = 0  # tokens since the blocks were last dropped
        self.primed: Arm | None = None  # chosen in the last step, in which there were no drafts yet
        self._linger = 0
        self._offered: dict[str, list[int]] = {}

    def offer(self, drafts: "DraftTokenIds") -> None:
        """The workers' drafts for the next step."""
        self._offered = dict(zip(drafts.req_ids, drafts.draft_token_ids, strict=False))

    def take(self) -> dict[str, list[int]]:
        """Request id -> its draft; each is there once."""
        offered, self._offered = self._offered, {}
        return offered

    def affordable(self, running: Iterable["Request"]) -> bool:
        """Whether it may draft: it is not behind, or catching up is cheap.

        Computing requests anew takes a row for each of their tokens. When several times as many tokens have been
        generated meanwhile, it adds little to the time that they took, however often the choice goes to and fro.
        """
        if not self.behind:
            return True
        return self.emitted >= TOKENS_PER_ROW * sum(request.num_tokens for request in running)

    def length(self, arm: Arm, scheduled_tokens: int) -> int:
        """Draft tokens to make after a step with this arm; 0 if the head only follows, RESTS if it does not run."""
        if arm.drafter == EAGLE:
            self._linger = LINGER
            return arm.k
        if self._linger and not self.behind:
            self._linger -= 1  # a short trial of another arm leaves no hole
            return 0
        self.behind = self.behind or scheduled_tokens > 0
        return RESTS

    def blocks_dropped(self) -> None:
        """No request holds anything that the head has not seen."""
        self.behind, self.emitted = False, 0
