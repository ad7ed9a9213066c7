"""Prompts under way whose responses may outlast a step: the state of `rollout.async_steps` and `rollout.partial`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_rl.config import Config
from megatron_rl.generation.groups import Group, visit
from megatron_rl.metrics import Metrics
from rollout.fleet.requests import RequestKey, continue_from, join_rollouts, key_of
from rollout.types import Rollout, RolloutRequest, TokenSource


class Pool:
    """Prompts that were begun and not trained on yet, by their position in the order of the data.

    Prompt `number` is meant for step `number // train.prompts_per_step + 1`, and the seeds of its responses are those
    of that step, whenever they are sampled. Without `rollout.partial` it is trained on in that step too; with it, a
    step takes those that are answered, the earliest first. No lock: its user has one.
    """

    def __init__(self, config: Config, make_group: Callable[[int], Group]) -> None:
        """Build an empty pool.

        Args:
            config: the experiment.
            make_group: the group with a number; called once for each, in their order.
        """
        self._config, self._make_group = config, make_group
        self._wanted, self._partial = config.train.prompts_per_step, config.rollout.partial
        self._extra = math.ceil(config.rollout.partial_fraction * self._wanted) if self._partial else 0
        self._next = 0
        self._groups: dict[int, Group] = {}
        self._numbers: dict[tuple[str, int], int] = {}
        self.unfinished: dict[RequestKey, Rollout] = {}
        """Responses that were stopped and are to continue."""

    def open(self, step: int) -> None:
        """Begin the prompts that may be under way before `step` (counted from 1) is trained.

        That is those of the steps up to `step + rollout.async_steps`: their tokens will be no more than so many updates
        old. `rollout.partial` adds its share.
        """
        self._next = max(self._next, self._wanted * (step - 1))  # of a run that resumes without what was under way
        last = min(step + self._config.rollout.async_steps, self._config.train.steps)
        while self._next < self._wanted * last + self._extra:
            self._put(self._next)
            self._next += 1

    def _put(self, number: int) -> Group:
        group = self._make_group(number)
        self._groups[number] = group
        self._numbers[visit(group.requests[0])] = number
        return group

    def requests(self) -> list[RolloutRequest]:
        """What is left to generate, the earliest prompts first; an unfinished response continues where it was."""
        left = [
            request
            for group in self._groups.values()
            for request in group.requests
            if request.sample_index not in group.rollouts
        ]
        pairs = ((request, self.unfinished.get(key_of(request))) for request in left)
        return [request if rollout is None else continue_from(request, rollout) for request, rollout in pairs]

    def add(self, rollout: Rollout) -> None:
        """Take what the fleet gave for one of `requests()`: its end, or as far as it has come."""
        key = key_of(rollout)
        if (beginning := self.unfinished.pop(key, None)) is not None:
            rollout = join_rollouts(beginning, rollout)
        if rollout.finish_reason == "unfinished":
            self.unfinished[key] = rollout
        else:
            self._groups[self._numbers[visit(rollout)]].rollouts[rollout.sample_index] = rollout

    def answered(self, step: int) -> int:
        """Responses that are finished, of those that `step` could be trained on."""
        return sum(len(self._groups[number].rollouts) for number in self._candidates(step))

    def is_ready(self, step: int) -> bool:
        """Whether the prompts of `step` are answered."""
        return len(self._complete(step)) >= self._wanted

    def _candidates(self, step: int) -> list[int]:
        return [number for number in self._groups if self._partial or number < self._wanted * step]

    def _complete(self, step: int) -> list[int]:
        groups = self._groups
        return [n for n in self._candidates(step) if len(groups[n].rollouts) == len(groups[n].requests)]

    def take(self, step: int) -> list[Group]:
        """The prompts to train on in `step`, when it is ready; they leave the pool."""
        taken = [self._groups.pop(number) for number in self._complete(step)[: self._wanted]]
        for group in taken:
            del self._numbers[visit(group.requests[0])]
        return taken

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint. Not while the fleet generates."""
        finished = [rollout for group in self._groups.values() for rollout in group.rollouts.values()]
        return {
            "next": self._next,
            "numbers": list(self._groups),
            "sampled_with": self._sampled_with(),
            "rollouts": [self._packed(rollout) for rollout in [*finished, *self.unfinished.values()]],
        }

    def restore(self, state: dict[str, Any]) -> bool:
        """Continue from `state()`; False when it is of other prompts or options, and so of no use."""
        for number in state["numbers"]:
            self._put(number)
        if state["sampled_with"] != self._sampled_with():
            self._groups.clear()
            self._numbers.clear()
            return False
        self._next = state["next"]
        for packed in state["rollouts"]:
            self.add(self._unpacked(packed))
        return True

    def _sampled_with(self) -> str:
        """Equal where responses belong to these prompts and could have been sampled here."""
        rollout = self._config.rollout
        prompts = [group.prompt.prompt_id for group in self._groups.values()]
        seeds = [request.seed for group in self._groups.values() for request in group.requests]
        options = rollout.max_tokens, rollout.temperature, sorted(rollout.sampling.items())
        return repr((self._wanted, options, prompts, seeds))

    def _packed(self, rollout: Rollout) -> dict[str, Any]:
        return {
            "number": self._numbers[visit(rollout)],
            "sample": rollout.sample_index,
            "reason": rollout.finish_reason,
            "version": rollout.policy_version,
            "precisions": rollout.precisions,
            "versions": rollout.versions,
            "tokens": torch.tensor(rollout.token_ids, dtype=torch.int32),
            "logprobs": torch.tensor(rollout.logprobs, dtype=torch.float64),
            "sources": torch.tensor(rollout.sources, dtype=torch.int8),
        }

    def _unpacked(self, packed: dict[str, Any]) -> Rollout:
        group = self._groups[packed["number"]]
        request = next(request for request in group.requests if request.sample_index == packed["sample"])
        return Rollout(
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            epoch=request.epoch,
            seed=request.seed,
            prompt_ids=request.prompt_ids,
            token_ids=packed["tokens"].tolist(),
            logprobs=packed["logprobs"].tolist(),
            finish_reason=packed["reason"],
            policy_version=packed["version"],
            sources=[TokenSource(value) for value in packed["sources"].tolist()],
            precisions=packed["precisions"],
            versions=packed["versions"],
        )


def staleness_metrics(rollouts: Sequence[Rollout], step: int) -> Metrics:
    """`staleness/*` of `docs/metrics.md`: over tokens, the updates between the weights that sampled them and those that
    are about to be trained, which are of version `step - 1`."""
    ages = [(step - 1 - version, count) for rollout in rollouts for version, count in rollout.versions]
    tokens = sum(count for _, count in ages)
    return {
        "staleness/mean": sum(age * count for age, count in ages) / max(tokens, 1),
        "staleness/max": float(max((age for age, _ in ages), default=0)),
    }
