"""vLLM's scheduler with drafts: it chooses whose and how many are verified, and measures what every step gave.

N-gram drafts are made here; those of an EAGLE head come from the workers, which make them after every step for the next
one. What is verified is decided here, in the engine's one scheduling process, and travels to the workers with the
schedule, so all tensor-parallel ranks agree. Which tokens come out does not depend on any decision made here (see
`rollout.sampling.verify`).
"""

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from rollout.speculation.bandit import (
    EAGLE,
    NGRAM,
    PLAIN,
    Arm,
    Controller,
    Expectation,
    Step,
    bucket_of,
    make_arms,
    make_controller,
)
from rollout.speculation.eagle import HeadDrafts
from rollout.speculation.history_drafts import HistoryDrafts
from rollout.speculation.ngram import Drafts, NgramDrafter
from rollout.speculation.step_cost import StepCost
from rollout.types import GROUP_KEY, HISTORY, SPECULATION_KEY, SpeculationCounts, TokenSource

TIMELINE_STEPS = 4096
# Where drafts do not pay, making and weighing them would be all they cost: after so many steps without one, they are
# looked at less and less often, as long as the number of live requests stays about the same.
PATIENCE, LONGEST_REST = 8, 32


@dataclass
class _Running:
    """The step under way."""

    arm: Arm
    started: float
    scheduled: SchedulerOutput
    drafts: dict[str, int]  # request id -> draft tokens
    pure: bool  # every request decodes: no prompt is computed
    from_history: dict[str, str]  # request id -> drafter, for those that draft from earlier responses
    accepted_by: Counter[str] = field(default_factory=Counter)
    tried_at: list[int] = field(default_factory=list)  # see `rollout.speculation.bandit.Step`
    accepted_at: list[int] = field(default_factory=list)

    def verified(self, request_id: str, accepted: int) -> None:
        """So many of a request's drafts were accepted."""
        drafter = self.from_history.get(request_id, self.arm.drafter)
        self.accepted_by[drafter] += accepted
        if drafter != self.arm.drafter:
            return
        for place in range(min(accepted + 1, self.drafts.get(request_id, 0))):
            if place == len(self.tried_at):
                self.tried_at.append(0)
                self.accepted_at.append(0)
            self.tried_at[place] += 1
            self.accepted_at[place] += place < accepted

    def drafted_by(self) -> Counter[str]:
        """Drafter -> draft tokens."""
        drafted: Counter[str] = Counter()
        for name, count in self.drafts.items():
            drafted[self.from_history.get(name, self.arm.drafter)] += count
        return drafted


class Rest:
    """When to look at drafts: at every step while they are used, ever more seldom while they are not.

    A new bucket of batch sizes ends a rest, because what did not pay for many requests may pay for few.
    """

    def __init__(self) -> None:
        self._bucket = self._unused = self._left = 0

    def goes_on(self, bucket: int) -> bool:
        """Whether the next step, with so many live requests, does without a look."""
        if bucket != self._bucket:
            self._bucket, self._unused, self._left = bucket, 0, 0
        self._left -= 1
        return self._left >= 0

    def looked(self, used: bool) -> None:
        """Drafts were looked at, and used or not."""
        self._unused = 0 if used else self._unused + 1
        self._left = min(1 << max(self._unused - PATIENCE, 0), LONGEST_REST) - 1


class SpeculativeScheduler(Scheduler):
    """Adds drafts to the running requests before each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Without a schedule of its own vLLM pads new requests to full drafts, of tokens that do not exist.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.scheduler_config.max_num_seqs + 1)
        self._controllers: dict[tuple[str, int, tuple[str, ...]], Controller] = {}
        self._settings: dict[str, Any] = self.vllm_config.additional_config[SPECULATION_KEY]
        self._head = HeadDrafts()
        self._history = HistoryDrafts(self._settings["history_tokens"], self._settings["max_bytes"])
        self._from_history: dict[str, str] = {}  # in the step under way: request id -> drafter
        self._cost = StepCost()
        self.set_speculation(self._settings["adaptive"], self._settings["max_draft_tokens"])
        self._numbers: dict[str, int] = {}  # request id -> number in the drafter
        self._told: dict[str, int] = {}  # request id -> output tokens that the drafter knows of
        self._accepted: dict[str, list[int]] = {}  # request id -> places of accepted drafts in its output
        self._started = 0
        self._under_way: _Running | None = None
        self._last: tuple[_Running, int] | None = None  # a step whose time is not known yet, tokens emitted
        self.timeline: deque[tuple[float, int, str, int]] = deque(maxlen=TIMELINE_STEPS)
        self.counts = SpeculationCounts()
        self._drafter_version = 0

    def set_speculation(self, adaptive: str, max_draft_tokens: int, drafters: Sequence[str] | None = None) -> None:
        """Use this rule, with what it learned before, and an empty n-gram drafter. For an engine without requests.

        `drafters` are some of those that the engine was started with; None means all of them.
        """
        self._drafters = tuple(drafters or self._settings["drafters"])
        key = adaptive, max_draft_tokens, self._drafters
        if key not in self._controllers:
            self._controllers[key] = make_controller(adaptive, self._drafters, max_draft_tokens, self._settings["seed"])
        self.controller, self._adaptive = self._controllers[key], adaptive
        self._rest = Rest()
        self._ngram = NgramDrafter(max_draft_tokens, self._settings["max_bytes"])
        self._ngram_arms = [arm for arm in make_arms([NGRAM], max_draft_tokens) if arm.k]
        self._head_arms = [arm for arm in make_arms([EAGLE], max_draft_tokens) if arm.k]
        self._head.primed = None

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        self._started += 1
        self._numbers[request.request_id] = self._started
        self._told[request.request_id] = request.num_output_tokens
        self._accepted[request.request_id] = []
        extra = (request.sampling_params.extra_args if request.sampling_params else None) or {}
        group = str(extra.get(GROUP_KEY, request.request_id))
        self._ngram.start(self._started, group, request.prompt_token_ids or [])
        self._history.start(request)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if request.request_id in self._numbers:
            self._tell([request])
            del self._told[request.request_id]
            self._ngram.finish(self._numbers.pop(request.request_id))
            self._history.finish(request)
        return super()._free_request(request, *args, **kwargs)

    def take_sources(self, request_id: str, tokens: int) -> list[TokenSource]:
        """Where the tokens of a finished request came from; forgets it."""
        sources = [TokenSource.FRESH] * tokens
        for place in self._accepted.pop(request_id, []):
            if place < tokens:  # drafts may reach past a stop token
                sources[place] = TokenSource.DRAFT
        kept, source = self._history.take_kept(request_id)
        sources[:kept] = [source] * min(kept, tokens)
        return sources

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        started = time.perf_counter()
        self._measure(started)
        arm = self._propose()
        self.counts.draft_seconds += time.perf_counter() - started
        scheduled = super().schedule(*args, **kwargs)
        if EAGLE in self._settings["drafters"]:
            scheduled.num_spec_tokens_to_schedule = self._head.length(arm, scheduled.total_num_scheduled_tokens)
        drafts = {name: len(tokens) for name, tokens in scheduled.scheduled_spec_decode_tokens.items()}
        pure = not scheduled.scheduled_new_reqs and all(
            tokens == 1 + drafts.get(name, 0) for name, tokens in scheduled.num_scheduled_tokens.items()
        )
        self._under_way = _Running(arm, started, scheduled, drafts, pure, self._from_history)
        scheduled.judged = self._history.judged(scheduled, self.requests)  # for `vllm_patch`, in the workers
        return scheduled

    def _propose(self) -> Arm:
        """Give each decoding request its draft; returns the arm that was chosen."""
        offered = self._head.take()
        ready = [request for request in self.running if not request.is_prefill_chunk]
        self._from_history = self._hand_out_history(ready)
        if self._from_history:
            ready = [request for request in ready if request.request_id not in self._from_history]
            if not ready:
                return PLAIN
        batch = len(ready)
        if EAGLE in self._drafters and not ready:  # whether the head is to see the prompts, and draft after them
            batch = min(len(self.requests), self.max_num_running_reqs)
        if not batch:
            return PLAIN
        if self._rest.goes_on(bucket_of(len(self.running) or batch)):
            self.controller.counts[bucket_of(batch), PLAIN] += 1
            return PLAIN
        if (arm := self._head.primed) is not None:
            self.controller.counts[bucket_of(batch), arm] += 1
        else:
            arm = self._choose(ready, batch)
        if arm.drafter == EAGLE:
            self._draft_with_head(arm, ready, offered)
        return arm

    def _choose(self, ready: list[Request], batch: int) -> Arm:
        """Ask the controller; n-gram drafts are handed out at once."""
        expected: dict[Arm, Expectation] = dict.fromkeys(self._ngram_arms, (0.0, 0.0))
        if NGRAM in self._drafters and ready:
            drafts = self._ngram_drafts(ready)
            drafted, accepted = drafts.drafted.tolist(), drafts.accepted.tolist()
            expected = {arm: (drafted[arm.k], accepted[arm.k]) for arm in self._ngram_arms}
        head = EAGLE in self._drafters and self._head.affordable(self.running)
        if not head:
            expected |= dict.fromkeys(self._head_arms, (0.0, 0.0))
        if not head and not any(drafted for drafted, _ in expected.values()):
            self.controller.counts[bucket_of(batch), PLAIN] += 1
            return PLAIN
        arm = self.controller.choose(batch, expected)
        if arm in expected and not expected[arm][0]:
            arm = PLAIN
        self._rest.looked(used=arm.k > 0 or not self.controller.knows(batch))
        if arm.drafter == NGRAM:
            lengths = drafts.lengths[: len(ready)].tolist()
            tokens = drafts.tokens[: len(ready)].tolist()
            self._hand_out(ready, [draft[:length] for draft, length in zip(tokens, lengths, strict=True)], arm.k)
        return arm

    def _ngram_drafts(self, ready: list[Request]) -> Drafts:
        self._tell(ready)
        numbers = [self._numbers[request.request_id] for request in ready]
        limits = [self._room(request) for request in ready]
        return self._ngram.propose(numbers, limits, self.controller.threshold(len(ready)))

    def _draft_with_head(self, arm: Arm, ready: list[Request], offered: dict[str, list[int]]) -> None:
        """Hand out what the head drafted; when it has not, the next step will do so, whatever its forecast then."""
        if self._head.behind:
            self.reset_prefix_cache(reset_running_requests=True)
            ready = []
        drafts = [offered.get(request.request_id, [])[: self._room(request)] for request in ready]
        self._head.primed = None if any(drafts) or (ready and self._head.primed) else arm
        self._hand_out(ready, drafts, arm.k)

    def _hand_out_history(self, ready: list[Request]) -> dict[str, str]:
        """Give those with an earlier response their drafts; returns their drafters."""
        drafts = self._history.propose(ready, self._room, self._cost.threshold(max(len(ready), 1)))
        share = max(self.max_num_scheduled_tokens - len(self.running), 0) // max(len(drafts), 1)
        for request in ready:
            if request.request_id in drafts:
                request.spec_token_ids = drafts[request.request_id][1][:share]
        return {name: drafter for name, (drafter, _) in drafts.items()}

    def _hand_out(self, requests: list[Request], drafts: list[list[int]], k: int) -> None:
        # Others may still hold drafts that were not scheduled in the last step; they get new ones here.
        reusing = [request for request in self.running if request.request_id in self._from_history]
        rows = len(requests) + sum(1 + len(request.spec_token_ids) for request in reusing)
        budget = max(self.max_num_scheduled_tokens - rows, 0)
        for request, draft in zip(requests, drafts, strict=True):
            request.spec_token_ids = draft[: min(k, budget)]
            budget -= len(request.spec_token_ids)

    def _room(self, request: Request) -> int:
        """Draft tokens that could still be of use: the step emits one more than it accepts."""
        length = min(self.max_model_len, request.num_prompt_tokens + request.max_tokens)
        return max(length - request.num_tokens - 1, 0)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """The workers' drafts for the next step, which chooses among them."""
        self._head.offer(draft_token_ids)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        dropped: bool = super().reset_prefix_cache(*args, **kwargs)
        if dropped:
            self._head.blocks_dropped()
        return dropped

    def renew_head(self, version: int) -> None:
        """The head has new weights, of this version: how often its drafts are accepted is to be learned again."""
        self._drafter_version = version
        for controller in self._controllers.values():
            controller.renew(EAGLE)
        self._rest = Rest()

    def _tell(self, requests: list[Request]) -> None:
        """Let the drafter know what these requests have generated since it was last told."""
        numbers, tokens = [], []
        for request in requests:
            told = self._told[request.request_id]
            if request.num_output_tokens > told:
                numbers.append(self._numbers[request.request_id])
                tokens.append(request.output_token_ids[told:])
                self._told[request.request_id] = request.num_output_tokens
        if numbers:
            self._ngram.extend(numbers, tokens)

    def update_from_output(self, scheduler_output: SchedulerOutput, output: ModelRunnerOutput) -> Any:
        under_way, self._under_way = self._under_way, None
        sampled = output.sampled_token_ids
        emitted = sum(map(len, sampled))
        self._learn_history(scheduler_output, output)
        for name in scheduler_output.scheduled_spec_decode_tokens:
            new = len(sampled[output.req_id_to_index[name]])
            if new and name in self._accepted:
                if under_way is not None:
                    under_way.verified(name, new - 1)
                first = self.requests[name].num_output_tokens
                self._accepted[name].extend(range(first, first + new - 1))
        outputs = super().update_from_output(scheduler_output, output)
        self._head.emitted += emitted
        if under_way is not None:
            self._last = under_way, emitted
            if not self.has_unfinished_requests():
                self._measure(time.perf_counter())  # the next step may be long in coming
        return outputs

    def _learn_history(self, scheduled: SchedulerOutput, output: ModelRunnerOutput) -> None:
        for name, index in output.req_id_to_index.items():
            tokens = output.sampled_token_ids[index]
            if tokens and name in self._history:
                drafted = len(scheduled.scheduled_spec_decode_tokens.get(name, ()))
                assert output.logprobs is not None  # every request of ours asks for them
                marks = output.logprobs.slice_request(index, len(tokens)).sampled_token_ranks
                self._history.verified(self.requests[name], drafted, tokens, bool(marks[-1]))

    def _measure(self, now: float) -> None:
        """The last step ends where this one begins, so that all the engine does for a step is counted."""
        if self._last is None:
            return
        (step, emitted), self._last = self._last, None
        batch, drafted = len(step.scheduled.num_scheduled_tokens), sum(step.drafts.values())
        seconds = now - step.started
        self._count(step, batch, drafted, emitted, seconds)
        self.timeline.append((step.started, batch, str(step.arm), emitted))
        # A step in which the head only drafts for the next one costs more than a plain one.
        primes = step.arm.drafter == EAGLE and not drafted
        if step.pure and emitted and not primes:
            self._cost.observe(batch, drafted, seconds)
        if step.pure and emitted and not primes and not step.from_history:
            # What n-gram drafts expect is told by their own chances.
            places = (tuple(step.tried_at), tuple(step.accepted_at)) if step.arm.drafter == EAGLE else ((), ())
            self.controller.observe(Step(step.arm, batch, drafted, emitted, seconds, *places))

    def _count(self, step: _Running, batch: int, drafted: int, emitted: int, seconds: float) -> None:
        counts = self.counts
        counts.steps += 1
        counts.verifications += batch
        accepted = step.accepted_by.total()
        counts.drafted += drafted
        counts.accepted += accepted
        counts.emitted += emitted
        counts.seconds += seconds
        if drafted:
            drafted_by, saved = step.drafted_by(), self._cost.saved(batch, emitted, seconds) if step.pure else 0.0
            counts.drafted_by += drafted_by
            counts.accepted_by += step.accepted_by
            for drafter, tokens in drafted_by.items():
                share = step.accepted_by[drafter] / accepted if accepted else tokens / drafted
                counts.saved_by[drafter] += saved * share
            counts.history_seconds += seconds * drafted_by[HISTORY] / (batch + drafted)
        if step.arm.drafter == EAGLE:
            counts.tried_at.update(dict(enumerate(step.tried_at)))
            counts.accepted_at.update(dict(enumerate(step.accepted_at)))

    def state(self) -> dict[str, Any]:
        """What the rule in use has learned, as plain values."""
        return {"adaptive": self._adaptive, "learned": self.controller.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned; what another rule has learned is of no use and left aside."""
        if state["adaptive"] == self._adaptive:
            self.controller.restore(state["learned"])

    def take_counts(self) -> SpeculationCounts:
        """Totals since the last call."""
        counts, self.counts = self.counts, SpeculationCounts()
        counts.chosen = Counter({(bucket, str(arm)): steps for (bucket, arm), steps in self.controller.counts.items()})
        counts.drafter_version = self._drafter_version
        self.controller.counts.clear()
        return counts
