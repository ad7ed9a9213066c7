"""Leaves out updates whose loss or gradient is not finite, and ends a run that has nothing else."""

import logging
import math
from collections.abc import Sequence

import torch

from megatron_rl.distributed.runtime import Runtime

log = logging.getLogger(__name__)


class UpdateGuard:
    """Looks at every update before the optimizer applies it. One that is not finite would make all weights so."""

    def __init__(self, runtime: Runtime, limit: int) -> None:
        """Begin to count.

        Args:
            runtime: this process's place.
            limit: so many updates in a row that are not finite end the run (`train.max_skipped_updates`).
        """
        self._runtime, self._limit = runtime, limit
        self._in_a_row = 0

    def allows(self, update: int, losses: Sequence[float], grad_norm: float) -> bool:
        """Whether the optimizer may apply an update; the same answer on all ranks, which all have to call this.

        Args:
            update: its number, for the log.
            losses: of this rank's micro-batches.
            grad_norm: of the whole gradient, before clipping.

        Raises:
            RuntimeError: on all ranks, when this one and the ones before make up the limit.
        """
        finite = torch.tensor(int(math.isfinite(grad_norm) and all(map(math.isfinite, losses))))
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN, group=self._runtime.control_group)
        if finite:
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        if self._in_a_row >= self._limit:
            raise RuntimeError(
                f"{self._in_a_row} updates in a row had a loss or gradient that is not finite "
                f"(train.max_skipped_updates={self._limit}; the norm of the last gradient is {grad_norm}); the policy "
                "is as it was before them: lower train.lr, look at optim/grad_norm and the rewards before them, and "
                "start again, which goes on from the newest checkpoint."
            )
        if self._runtime.is_driver:
            log.warning(
                "update %d skipped: its loss or gradient is not finite (norm %s); %d in a row, %d end the run",
                update,
                grad_norm,
                self._in_a_row,
                self._limit,
            )
        return False
