"""Reuse of earlier responses: the driver's side. What goes with a step's requests, what is stored, and what it gave."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_rl.config import Config
from megatron_rl.config.history import LenienceBudgetConfig
from megatron_rl.data.order import is_refreshed
from megatron_rl.generation.response_store import Key, ResponseStore
from megatron_rl.metrics import Metrics
from rollout.types import Past, Rollout, RolloutRequest, TokenSource

_DRAFTED = (TokenSource.DRAFT,)
_REUSED = (TokenSource.HISTORY, TokenSource.KEPT)


class Lenience:
    """The lenience of the next step: fixed, or adapted to hold a budget.

    After a step it moves by `GAIN` times the log of target by measurement, which is small near the target; by at most
    `LARGEST_MOVE`, which is what it takes where nothing was kept or nothing differs.
    """

    GAIN, LARGEST_MOVE = 0.25, 0.25
    BOUND = 2.0
    """Nats; SPEC-RL lost accuracy there, so more has to be asked for."""

    def __init__(self, start: float, budget: LenienceBudgetConfig | None) -> None:
        self.value = start
        self._budget = budget

    def observe(self, kept: int, drift: "Drift") -> None:
        """Take in a step in which earlier responses were verified; `drift` is that of the `kept` tokens."""
        if self._budget is None:
            return
        target, measured = self._budget.target, drift.kl
        if self._budget.measure == "ess":
            target, measured = 1 - target, 1 - drift.ess
        move = self.GAIN * math.log(target / measured) if kept and measured > 0 else math.inf
        moved = self.value + min(max(move, -self.LARGEST_MOVE), self.LARGEST_MOVE)
        self.value = min(max(moved, -self.BOUND), self.BOUND)


class Drift:
    """How far the current policy is from the one that drew some tokens.

    `kl` is the k3 estimate of KL(then || now) per token (Schulman, "Approximating KL divergence", 2020), `ess` the
    effective sample size of the ratios as a share of the tokens (Kong, 1992). Of no tokens they are 0 and 1.
    """

    def __init__(self, log_ratios: Sequence[float]) -> None:
        """Measure it.

        Args:
            log_ratios: `logprob now - logprob then` of each token, nats.
        """
        self.kl, self.ess = 0.0, 1.0
        if log_ratios:
            delta = torch.tensor(log_ratios, dtype=torch.float64).clamp(-20, 20)
            ratios = delta.exp()
            self.kl = float((ratios - 1 - delta).mean().clamp(min=0))
            self.ess = float(ratios.sum() ** 2 / (len(ratios) * (ratios**2).sum()))


class Reuse:
    """What `rollout.history` asks for, step after step."""

    def __init__(self, config: Config) -> None:
        self._config, self._settings = config, config.rollout.history
        self._history = ResponseStore(self._settings.memory_mb * 2**20)
        self._lenience = Lenience(self._settings.lenience, self._settings.budget)
        # Responses that are expected to come again in the step under way, by prompt id, sample index, epoch.
        self._pasts: dict[tuple[str, int, int], Past] = {}
        self._used: set[Key] = set()
        self._found = 0

    def attach(self, requests: Sequence[RolloutRequest], further: bool = False) -> list[RolloutRequest]:
        """The requests with the earlier responses that they are to reuse: those of a new step, or `further` ones."""
        if not further:
            self._pasts, self._used, self._found = {}, set(), 0
        if self._settings.mode == "off":
            return list(requests)
        return [self._attach(request) for request in requests]

    def _attach(self, request: RolloutRequest) -> RolloutRequest:
        key = request.prompt_id, request.sample_index
        record = self._history.get(*key, request.prompt_ids)
        # A step that straddles epochs may visit a prompt twice: with one seed for both, it would draw the same twice.
        if record is None or key in self._used:
            return request
        self._used.add(key)
        self._found += 1
        settings = self._settings
        if is_refreshed(self._config.train.seed, request.epoch, *key, settings.refresh):
            return replace(request, past=record.past)
        if settings.mode == "lenient" and self._lenience.value == -math.inf:
            return replace(request, past=record.past)
        self._pasts[*key, request.epoch] = record.past
        if settings.mode == "coupled":
            return replace(request, past=record.past, seed=record.past.seed)
        return replace(request, past=record.past, lenience=self._lenience.value)

    def finish_step(self, rollouts: Sequence[Rollout], rewards: Sequence[float]) -> Metrics:
        """Store a step's rollouts; returns its metrics by the names of `docs/metrics.md`."""
        if self._settings.mode == "off":
            return {}
        drift = Drift(self._log_ratios(rollouts))
        metrics = reuse_metrics(rollouts) | {"history/found_fraction": self._found / len(rollouts)}
        if self._pasts:
            metrics["history/prefix_mean"] = metrics["history/reused_tokens"] / len(self._pasts)
        if self._settings.mode == "lenient":
            metrics |= {"history/lenience": self._lenience.value, "history/kl": drift.kl, "history/ess": drift.ess}
            if self._pasts:
                self._lenience.observe(int(metrics["history/reused_tokens"]), drift)
        for rollout, reward in zip(rollouts, rewards, strict=True):
            self._history.put(rollout, reward)
        return metrics | {
            "history/responses": float(len(self._history)),
            "history/megabytes": self._history.bytes / 2**20,
            "history/evicted": float(self._history.evicted),
        }

    def _log_ratios(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Of the kept tokens, log-probability now minus then, by the engines."""
        ratios: list[float] = []
        for rollout in rollouts:
            past = self._pasts.get((rollout.prompt_id, rollout.sample_index, rollout.epoch))
            kept = rollout.sources.count(TokenSource.KEPT)
            if past is not None and kept:
                thens = past.logprobs[:kept].tolist()
                ratios += [now - then for now, then in zip(rollout.logprobs[:kept], thens, strict=True)]
        return ratios

    def state(self) -> dict[str, Any]:
        """Everything that the next steps depend on, for checkpoints."""
        return {
            "history": self._history.state(),
            "lenience": self._lenience.value,
            "sampled_with": self._sampled_with(),
        }

    def restore(self, state: dict[str, Any]) -> bool:
        """Take over what `state` returned; False when responses were drawn in another way, and so are of no use now."""
        if state["sampled_with"] != self._sampled_with():
            return False
        self._history.restore(state["history"])
        if self._settings.budget is not None:
            self._lenience.value = state["lenience"]
        return True

    def _sampled_with(self) -> str:
        """What the log-probs of responses depend on beside the weights."""
        rollout = self._config.rollout
        return repr((rollout.temperature, sorted(rollout.sampling.items())))


def reuse_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    """Where the tokens came from; `reused`, `drafted` and `generated` add up to the response tokens."""
    reused = [sum(source in _REUSED for source in rollout.sources) for rollout in rollouts]
    drafted = sum(source in _DRAFTED for rollout in rollouts for source in rollout.sources)
    whole = sum(count == len(rollout.token_ids) for count, rollout in zip(reused, rollouts, strict=True))
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    return {
        "history/reused_tokens": float(sum(reused)),
        "history/drafted_tokens": float(drafted),
        "history/generated_tokens": float(tokens - sum(reused) - drafted),
        "history/full_reuse_fraction": whole / len(rollouts),
    }
