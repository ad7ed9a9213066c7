"""The trained EAGLE head as a drafter: its options for vLLM, and what the scheduler has to track.

vLLM's proposer runs the head in the workers, after every step, and drafts for the next one.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_rl.config import Config, ConfigError
from rollout.speculation.arms import EAGLE, Arm

if TYPE_CHECKING:
    from vllm.v1.outputs import DraftTokenIds
    from vllm.v1.request import Request

HEAD_IDLE = -1
"""Value of `SchedulerOutput.num_spec_tokens_to_schedule`: the head does not run in this step, see `vllm_patches.py`."""
LINGER = 8
"""Steps for which the head follows the requests after its drafts were last used."""
TOKENS_PER_ROW = 4
"""Tokens that must have been generated for each one that is recomputed."""


def kind_of(folder: str | Path) -> Literal["eagle3", "eagle"]:
    """The form of the head in a folder in vLLM's format.

    Raises:
        ConfigError: the folder has no `config.json`.
    """
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

    Raises:
        ConfigError: no folder is given, it holds no head, or a head of another `drafter.kind`.
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
        # The policy may start with random weights, which the trainer replaces; the head needs those in its folder.
        "draft_load_config": {"load_format": "auto"},
    }


class HeadDrafts:
    """What the head has drafted, and whether its cache covers all tokens of the running requests.

    The head keeps keys and values of the tokens that it has processed, in the policy's blocks. Where its drafts do not
    pay it is idle, which leaves holes in them: later drafts would be worse, and their acceptance would be learned. So
    once it was idle it is `behind`, and before it drafts again all blocks are dropped and the running requests
    recomputed.
    """

    def __init__(self) -> None:
        self.behind = False
        """Whether the head has missed tokens of running requests."""
        self.emitted = 0
        """Tokens since the blocks were last dropped."""
        self.primed: Arm | None = None
        """The arm of the last step if it chose the head but had no drafts yet: this step verifies them."""
        self._linger = 0
        self._offered: dict[str, list[int]] = {}

    def offer(self, drafts: "DraftTokenIds") -> None:
        """The workers' drafts for the next step."""
        self._offered = dict(zip(drafts.req_ids, drafts.draft_token_ids, strict=False))

    def take(self) -> dict[str, list[int]]:
        """Request id -> its draft; each is returned once."""
        offered, self._offered = self._offered, {}
        return offered

    def affordable(self, running: Iterable["Request"]) -> bool:
        """Whether it may draft: it is not behind, or catching up is cheap.

        Recomputing requests takes a row for each of their tokens. When several times as many tokens have been generated
        since the last time, it adds little to the time that they took, however often the choice changes.
        """
        if not self.behind:
            return True
        return self.emitted >= TOKENS_PER_ROW * sum(request.num_tokens for request in running)

    def length(self, arm: Arm, scheduled_tokens: int) -> int:
        """Draft tokens to make after a step with this arm; 0 if the head only follows, HEAD_IDLE if it does not run."""
        if arm.drafter == EAGLE:
            self._linger = LINGER
            return arm.k
        if self._linger and not self.behind:
            self._linger -= 1  # a short trial of another arm leaves no hole
            return 0
        self.behind = self.behind or scheduled_tokens > 0
        return HEAD_IDLE

    def blocks_dropped(self) -> None:
        """All blocks were dropped: no request holds tokens that the head has missed."""
        self.behind, self.emitted = False, 0
