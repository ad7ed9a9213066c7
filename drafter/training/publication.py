"""Decides which head drafts: engines get a trained head only when it drafts better than the one they have."""

import copy
import math
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from drafter.eagle.expected_acceptance import ExpectedAcceptance, expected_acceptance
from drafter.eagle.head import EagleHead
from drafter.eagle.packed_rows import FrozenPolicy, PackedFeatures

CLEARLY_WORSE = 0.1
"""Fraction of the live head's accepted tokens that a trained head may lose before it is discarded."""
NOISE = 0.05
"""Loss in tokens per verification that is tolerated in any case."""


class Decision(Enum):
    """What to do with a trained head."""

    PUBLISH = "publish"
    KEEP_TRAINING = "keep training"
    RESTORE = "restore"
    """It is broken or clearly worse: training starts again from the live head."""


def decide(trained_length: float, live_length: float) -> Decision:
    """Compare expected acceptance lengths (tokens per verification) on the same held-out features."""
    if not math.isfinite(trained_length):
        return Decision.RESTORE
    if trained_length > live_length or not math.isfinite(live_length):
        return Decision.PUBLISH
    tolerated = max(CLEARLY_WORSE * (live_length - 1), NOISE)
    return Decision.RESTORE if trained_length < live_length - tolerated else Decision.KEEP_TRAINING


class LiveHead:
    """The head that the engines draft with: a copy of the weights when they were published, and their version."""

    def __init__(self, head: EagleHead) -> None:
        """
        Args:
            head: the one that the run starts with, version 0.
        """
        self.head = copy.deepcopy(head).requires_grad_(False)
        self.version = 0
        self.step = 0
        """The step of the run after which it was published."""

    def publish(self, trained: EagleHead, step: int) -> None:
        """Copy the weights of `trained`, which becomes the live head."""
        self.head.load_state_dict(trained.state_dict())
        self.version, self.step = self.version + 1, step

    def restore_into(self, trained: EagleHead) -> None:
        """Replace the weights of `trained` by the live ones."""
        trained.load_state_dict(self.head.state_dict())

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"head": self.head.state_dict(), "version": self.version, "step": self.step}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self.head.load_state_dict(state["head"])
        self.version, self.step = state["version"], state["step"]


def score(
    head: EagleHead,
    rows: list[PackedFeatures],
    policy: FrozenPolicy,
    steps: int,
    temperature: float,
    group: torch.distributed.ProcessGroup | None = None,
) -> ExpectedAcceptance:
    """Expected acceptance over the held-out rows of all ranks; each rank gives its own. A collective operation.

    Args:
        head: to evaluate; on the device of `policy`.
        rows: held-out rows of this rank, possibly none.
        policy: what they were computed with.
        steps: draft tokens per verification.
        temperature: of the engines, above 0.
        group: of all ranks that give rows, able to move tensors of the device; None: the default group.
    """
    device = policy.embedding.device
    zeros = torch.zeros(steps, dtype=torch.float64, device=device)
    total = ExpectedAcceptance(zeros, zeros)
    for row in rows:
        total = total + expected_acceptance(head, row.to(device), policy, steps, temperature)
    flat: Tensor = torch.stack([total.reached, total.accepted])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat, group=group)
    return ExpectedAcceptance(*flat.cpu())
