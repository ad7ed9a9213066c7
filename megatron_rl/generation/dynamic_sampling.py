"""Dynamic sampling: prompts that teach nothing are replaced by further ones while the engines generate."""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from megatron_rl.generation.groups import Group, visit
from megatron_rl.rewards.score import Score
from rollout.types import Rollout, RolloutRequest


class DynamicSampling:
    """Finds `wanted` prompts whose responses do not all have the same reward (DAPO, arXiv 2503.14476, equation 11).

    Every prompt without a difference is replaced by the next one in the order of the data. So the prompts of a step are
    always the first ones in this order among which `wanted` differ, whichever of them is ready first. Groups are scored
    in a thread of their own, so that a slow reward keeps no engine waiting. Use it as a context manager.
    """

    def __init__(
        self, wanted: int, limit: int, make_group: Callable[[int], Group], score: Callable[[Group], list[Score]]
    ) -> None:
        """Request the first `wanted` groups.

        Args:
            wanted: groups to find.
            limit: most groups to request, >= `wanted`.
            make_group: the group with a number, counted from 0; called once for each, in their order.
            score: scores of a finished group, in the order of its requests; called from one other thread.
        """
        self._wanted, self._limit, self._make_group, self._score = wanted, limit, make_group, score
        self.groups = [make_group(number) for number in range(wanted)]
        """Requested so far, in their order."""
        self._unfinished = {visit(group.requests[0]): group for group in self.groups}
        self._scoring: set[Future[Group]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dynamic-sampling")

    def __enter__(self) -> "DynamicSampling":
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def add(self, rollout: Rollout) -> None:
        """Take a finished response of one of the groups."""
        group = self._unfinished[visit(rollout)]
        group.rollouts[rollout.sample_index] = rollout
        if len(group.rollouts) == len(group.requests):
            del self._unfinished[visit(rollout)]
            self._scoring.add(self._thread.submit(self._finish, group))

    def _finish(self, group: Group) -> Group:
        group.scores = self._score(group)
        return group

    def more(self, idle: bool) -> list[list[RolloutRequest]]:
        """The requests of further groups, for `RolloutFleet.generate`.

        Args:
            idle: the engines have nothing left to do; wait for scores until one calls for a group or all are known.
        """
        while True:
            done, self._scoring = wait(self._scoring, None if idle else 0, FIRST_COMPLETED)
            further = [group for scored in done if not scored.result().teaches for group in self._next()]
            if further or not (idle and self._scoring):
                return [group.requests for group in further]

    def _next(self) -> list[Group]:
        """The next group, or none at the limit."""
        if len(self.groups) == self._limit:
            return []
        group = self._make_group(len(self.groups))
        self.groups.append(group)
        self._unfinished[visit(group.requests[0])] = group
        return [group]

    def chosen(self) -> list[Group]:
        """When all are scored: the `wanted` groups to learn from, in their order.

        Where the limit left too few that differ, the first ones of the others fill the batch.
        """
        teaching = [number for number, group in enumerate(self.groups) if group.teaches]
        others = [number for number, group in enumerate(self.groups) if not group.teaches]
        numbers = teaching + others[: self._wanted - len(teaching)]
        return [self.groups[number] for number in sorted(numbers)]

    def metrics(self) -> dict[str, float]:
        """When all are scored, by the names of `docs/metrics.md`."""
        teaching = sum(group.teaches for group in self.groups)
        return {
            "sampling/prompts": float(len(self.groups)),
            "sampling/dropped_fraction": 1 - teaching / len(self.groups),
            "sampling/filled_prompts": float(self._wanted - teaching),
        }
