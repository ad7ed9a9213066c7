"""Responses of the fleet to held-out problems, scored. Runs on the driver alone."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_rl.config import Config
from megatron_rl.config.heldout_sets import set_name
from megatron_rl.config.sections import RewardConfig
from megatron_rl.data.order import evaluation_seed
from megatron_rl.data.prompts import Prompt, load_prompts
from megatron_rl.data.public import EVALUATION
from megatron_rl.evaluation.results import Outcome, ProblemResult
from megatron_rl.observability.console import Console, shown
from megatron_rl.rewards.admission import readable
from megatron_rl.rewards.answers import final_answer
from megatron_rl.rewards.score import ScoreItem, Scorer
from rollout.fleet.fleet import RolloutFleet
from rollout.types import Rollout, RolloutRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORED_AT_ONCE = 64  # responses: enough to keep all reward workers busy, few enough to lose in a crash
Answered = tuple[Prompt, list[Rollout]]
"""A problem with all its responses."""


@dataclass(frozen=True)
class HeldoutSet:
    """One set, ready to be generated from."""

    name: str
    """In metrics and files."""
    prompts: list[Prompt]
    reward: RewardConfig


def load_set(spec: str, config: Config, tokenizer: "PreTrainedTokenizerBase") -> HeldoutSet:
    """The first `eval.max_prompts` prompts of an entry of `data.eval`.

    A public set is scored by a reward of its own, every other set by the section `reward`.

    Raises:
        ConfigError: see `load_prompts`.
    """
    name = set_name(spec)
    reward = config.reward
    if name in EVALUATION:
        reward = RewardConfig(name=EVALUATION[name].reward, timeout_s=reward.timeout_s)
    prompts = load_prompts(spec, config.data, tokenizer, config.data.eval_split, heldout=True)
    return HeldoutSet(name, prompts[: config.eval.max_prompts], reward)


def with_readable_answers(heldout: HeldoutSet, spec: str, config: Config, scorer: Scorer) -> HeldoutSet:
    """The set without problems whose reference answers its reward cannot read; the log names them.

    Args:
        heldout: a set.
        spec: its entry in `data.eval`.
        config: the experiment.
        scorer: of the section `reward`.

    Raises:
        ConfigError: when they are more than `data.max_left_out`.
    """
    limit = config.data.max_left_out
    if _reward_name(heldout.reward) == _reward_name(scorer.reward):
        prompts = readable(heldout.prompts, scorer, "data.eval", spec, limit)
    else:
        with Scorer(heldout.reward, max_tokens=1) as own:
            prompts = readable(heldout.prompts, own, "data.eval", spec, limit)
    return replace(heldout, prompts=prompts)


class Evaluator:
    """One greedy response to every problem, and `eval.samples` at `rollout.temperature`."""

    def __init__(
        self,
        config: Config,
        tokenizer: "PreTrainedTokenizerBase",
        fleet: RolloutFleet,
        console: Console,
        sets: Sequence[HeldoutSet],
        scorer: Scorer,
    ) -> None:
        """Start the reward workers that `sets` need besides `scorer`, which is the one of the section `reward`.

        Raises:
            ConfigError: when a reward cannot be used.
        """
        self._config, self._tokenizer, self._fleet, self._console = config, tokenizer, fleet, console
        self._scorers = {_reward_name(config.reward): scorer}
        self._own: list[Scorer] = []
        for heldout in sets:
            if _reward_name(heldout.reward) not in self._scorers:
                self._own.append(Scorer(heldout.reward, config.rollout.max_tokens))
                self._scorers[_reward_name(heldout.reward)] = self._own[-1]

    def results(
        self, heldout: HeldoutSet, step: int, prompts: Sequence[Prompt] | None = None
    ) -> Iterator[ProblemResult]:
        """The problems of a set as they finish.

        Args:
            heldout: one of the sets given at the start.
            step: of the run; seeds derive from it.
            prompts: only these of the set's.
        """
        by_key = {
            f"{heldout.name}/{prompt.prompt_id}": prompt for prompt in (heldout.prompts if prompts is None else prompts)
        }
        requests = [request for key, prompt in by_key.items() for request in self._requests(key, prompt, step)]
        unfinished: defaultdict[str, list[Rollout]] = defaultdict(list)
        finished: list[Answered] = []
        rollouts = self._fleet.generate(requests)
        for rollout in shown(rollouts, lambda: len(requests), f"evaluating {heldout.name}", self._console):
            key = rollout.prompt_id
            unfinished[key].append(rollout)
            if len(unfinished[key]) == self._config.eval.samples + 1:
                finished.append((by_key[key], unfinished.pop(key)))
            if sum(len(group) for _, group in finished) >= SCORED_AT_ONCE:
                yield from self._judge(heldout, finished)
                finished = []
        if finished:  # the tokenizer makes a text even of no responses
            yield from self._judge(heldout, finished)

    def _requests(self, key: str, prompt: Prompt, step: int) -> list[RolloutRequest]:
        """Those of one problem; the last one is the greedy one."""
        config, samples = self._config, self._config.eval.samples
        return [
            RolloutRequest(
                prompt_id=key,
                sample_index=sample,
                epoch=0,
                seed=evaluation_seed(config.train.seed, step, prompt.prompt_id, sample),
                prompt_ids=prompt.token_ids,
                max_tokens=config.rollout.max_tokens,
                temperature=config.rollout.temperature if sample < samples else 0.0,
            )
            for sample in range(samples + 1)
        ]

    def _judge(self, heldout: HeldoutSet, finished: Sequence[Answered]) -> Iterator[ProblemResult]:
        scorer = self._scorers[_reward_name(heldout.reward)]
        pairs = [
            (prompt, rollout)
            for prompt, group in finished
            for rollout in sorted(group, key=lambda rollout: rollout.sample_index)
        ]
        texts = self._tokenizer.batch_decode([rollout.token_ids for _, rollout in pairs], skip_special_tokens=True)
        # Without a length, no length penalty applies: accuracy is about the answer alone.
        scores = scorer.score(
            [
                ScoreItem(prompt.text, text, prompt.answer, length=0, record_id=f"{heldout.name}/{prompt.prompt_id}")
                for (prompt, _), text in zip(pairs, texts, strict=True)
            ]
        )
        scorer.metrics()  # failures are in the log and in the results, and belong to no training step
        reward = None if heldout.reward.function else heldout.reward.name
        outcomes = iter(
            [
                Outcome(
                    text,
                    final_answer(text, reward),
                    score.value > 0,
                    len(rollout.token_ids),
                    rollout.finish_reason,
                    score.error,
                )
                for (_, rollout), text, score in zip(pairs, texts, scores, strict=True)
            ]
        )
        for prompt, group in finished:
            *samples, greedy = itertools.islice(outcomes, len(group))
            yield ProblemResult(prompt.prompt_id, prompt.text, prompt.answer, greedy, samples)

    def close(self) -> None:
        """End the reward workers started here."""
        for scorer in self._own:
            scorer.close()


def _reward_name(reward: RewardConfig) -> str:
    return reward.function or reward.name
