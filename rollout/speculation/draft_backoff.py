"""Saves the work of making drafts where they do not pay."""

PATIENCE = 8
"""Consecutive steps without drafts before any step is skipped."""
LONGEST_BACKOFF = 32
"""Most steps between two considerations of drafts."""


class DraftBackoff:
    """Exponential backoff: drafts are considered at every step while they are used, and ever less often while not.

    Where drafts do not pay, making and weighing them would be all that they cost. A new bucket of batch sizes ends the
    backoff, because what did not pay for many requests may pay for few.
    """

    def __init__(self) -> None:
        self._bucket = self._unused = self._left = 0

    def skips(self, bucket: int) -> bool:
        """Whether the next step, in this bucket of batch sizes, does without drafts and without considering them."""
        if bucket != self._bucket:
            self._bucket, self._unused, self._left = bucket, 0, 0
        self._left -= 1
        return self._left >= 0

    def record(self, used: bool) -> None:
        """Drafts were considered, and used or not."""
        self._unused = 0 if used else self._unused + 1
        self._left = min(1 << max(self._unused - PATIENCE, 0), LONGEST_BACKOFF) - 1
