"""An alarm about a head that is hardly ever right."""

from collections.abc import Mapping

from megatron_rl.generation.speculation_metrics import log


class LiveAlarm:
    """Warns in the log while the engines accept hardly any draft of the head.

    Where its drafts do not pay, the engines try only a few in a step, so drafts are collected over steps until there
    are `ENOUGH` to judge by.
    """

    NEAR_ONE = 1.05
    """Tokens per verification; 1 is what plain decoding gives."""
    ENOUGH = 50
    """Drafts."""
    REPEAT = 10
    """Steps after which a warning that still holds is repeated."""

    def __init__(self) -> None:
        self._drafts = self._accepted = 0.0
        self._warned: int | None = None

    def observe(self, step: int, metrics: Mapping[str, float], version: int) -> None:
        """Judge the `drafter/live_*` of a step in which the head's `version` drafted."""
        drafts = metrics.get("drafter/live_drafts", 0.0)
        if drafts:
            self._drafts += drafts
            self._accepted += drafts * (metrics["drafter/live_length"] - 1)
        if self._drafts < self.ENOUGH:
            return
        drafts, length = self._drafts, 1 + self._accepted / self._drafts
        self._drafts = self._accepted = 0.0
        if length >= self.NEAR_ONE:
            self._warned = None
        elif self._warned is None or step >= self._warned + self.REPEAT:
            self._warned = step
            log.warning(
                f"step {step}: the engines emit only {length:.2f} tokens per verification of the drafter's drafts "
                f"({drafts:.0f} drafts, version {version}): hardly one is accepted. Warm it up on this policy "
                "(megatron-rl drafter warmup), train it more (drafter.min_slices, drafter.lr), or take eagle out of "
                "rollout.speculation.drafters."
            )
