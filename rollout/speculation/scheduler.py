"""vLLM's scheduler with drafts: it chooses whose and how many are verified, and measures what every step cost and gave.

N-gram drafts are made here; those of an EAGLE head come from the workers, which make them after every step for the next
one. What is verified is decided here, in the engine's one scheduling process, and travels to the workers with the
schedule, so all tensor-parallel ranks agree. Which tokens are emitted does not depend on any decision made here (see
`rollout.sampling.verify`).
"""

import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from rollout.speculation.arms import EAGLE, NGRAM, PLAIN, Arm, Controller, Expectation, bucket_of, make_arms
from rollout.speculation.bandit import make_controller
from rollout.speculation.draft_backoff import DraftBackoff
from rollout.speculation.eagle import HeadDrafts
from rollout.speculation.history_drafts import HistoryDrafts
from rollout.speculation.ngram_requests import NgramRequests, extras_of
from rollout.speculation.speculation_settings import LearnedSpeculation, SpeculationSettings
from rollout.speculation.step_cost import StepCost
from rollout.speculation.step_in_flight import StepInFlight
from rollout.types import SpeculationCounts, TimelineStep, TokenSource

TIMELINE_STEPS = 4096


class SpeculativeScheduler(Scheduler):
    """Adds drafts to the running requests before each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Without a schedule of its own vLLM pads new requests to full drafts, of tokens that do not exist.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.scheduler_config.max_num_seqs + 1)
        self._controllers: dict[tuple[str, int, tuple[str, ...]], Controller] = {}
        settings = SpeculationSettings.from_vllm(self.vllm_config.additional_config)
        assert settings is not None  # the engine sets them together with this scheduler
        self._settings = settings
        self._head = HeadDrafts()
        self._history = HistoryDrafts(settings.history_tokens, settings.max_bytes)
        self._from_history: dict[str, str] = {}  # in the step under way: request id -> drafter
        self._cost = StepCost()
        self.set_speculation(settings.adaptive, settings.max_draft_tokens)
        self._accepted: dict[str, list[int]] = {}  # request id -> positions of accepted drafts in its output
        self._in_flight: StepInFlight | None = None
        self._unmeasured: StepInFlight | None = None  # the last step: its time is known when the next one begins
        self.timeline: deque[TimelineStep] = deque(maxlen=TIMELINE_STEPS)
        self.counts = SpeculationCounts()
        self._drafter_version = 0

    def set_speculation(self, adaptive: str, max_draft_tokens: int, drafters: Sequence[str] | None = None) -> None:
        """Use this rule, with what it learned before, and an empty n-gram drafter. For an engine without requests.

        Args:
            adaptive: as `rollout.speculation.adaptive`.
            max_draft_tokens: per request and step.
            drafters: some of those that the engine was started with; None means all of them.
        """
        self._drafters = tuple(drafters or self._settings.drafters)
        key = adaptive, max_draft_tokens, self._drafters
        if key not in self._controllers:
            self._controllers[key] = make_controller(adaptive, self._drafters, max_draft_tokens, self._settings.seed)
        self.controller, self._adaptive = self._controllers[key], adaptive
        self._backoff = DraftBackoff()
        self._ngram = NgramRequests(max_draft_tokens, self._settings.max_bytes)
        self._ngram_arms = [arm for arm in make_arms([NGRAM], max_draft_tokens) if arm.k]
        self._head_arms = [arm for arm in make_arms([EAGLE], max_draft_tokens) if arm.k]
        self._head.primed = None

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        self._accepted[request.request_id] = []
        group = str(extras_of(request).group or request.request_id)
        self._ngram.start(request, group, request.prompt_token_ids or [])
        self._history.start(request)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if request in self._ngram:
            self._ngram.update([request])
            self._ngram.finish(request)
        self._history.finish(request)
        return super()._free_request(request, *args, **kwargs)

    def take_sources(self, request_id: str, tokens: int) -> list[TokenSource]:
        """Where the tokens of a finished request came from; forgets it."""
        sources = [TokenSource.FRESH] * tokens
        for position in self._accepted.pop(request_id, []):
            if position < tokens:  # drafts may reach past a stop token
                sources[position] = TokenSource.DRAFT
        kept, source = self._history.take_kept(request_id)
        sources[:kept] = [source] * min(kept, tokens)
        return sources

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        started = time.perf_counter()
        self._measure(started)
        arm = self._propose()
        self.counts.draft_seconds += time.perf_counter() - started
        scheduled = super().schedule(*args, **kwargs)
        if self._settings.uses_head:
            scheduled.num_spec_tokens_to_schedule = self._head.length(arm, scheduled.total_num_scheduled_tokens)
        drafts = {name: len(tokens) for name, tokens in scheduled.scheduled_spec_decode_tokens.items()}
        pure = not scheduled.scheduled_new_reqs and all(
            tokens == 1 + drafts.get(name, 0) for name, tokens in scheduled.num_scheduled_tokens.items()
        )
        batch = len(scheduled.num_scheduled_tokens)
        self._in_flight = StepInFlight(arm, started, batch, drafts, pure, self._from_history)
        # For the sampler, in the workers: see `rollout.engine.vllm_patches`.
        scheduled.lenient_drafts = self._history.lenient_drafts(scheduled, self.requests)
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
        if EAGLE in self._drafters and not ready:  # decide whether the head reads the prompts, and drafts after them
            batch = min(len(self.requests), self.max_num_running_reqs)
        if not batch:
            return PLAIN
        if self._backoff.skips(bucket_of(len(self.running) or batch)):
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
        """Let the controller choose; n-gram drafts are handed out at once."""
        expected: dict[Arm, Expectation] = dict.fromkeys(self._ngram_arms, (0.0, 0.0))
        if NGRAM in self._drafters and ready:
            limits, threshold = [self._room(request) for request in ready], self.controller.threshold(len(ready))
            drafts = self._ngram.propose(ready, limits, threshold)
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
        self._backoff.record(used=arm.k > 0 or not self.controller.knows(batch))
        if arm.drafter == NGRAM:
            self._hand_out(ready, drafts.token_lists(len(ready)), arm.k)
        return arm

    def _draft_with_head(self, arm: Arm, ready: list[Request], offered: dict[str, list[int]]) -> None:
        """Hand out what the head drafted; if there is nothing yet, the next step does so, whatever its forecast."""
        if self._head.behind:
            self.reset_prefix_cache(reset_running_requests=True)
            ready = []
        drafts = [offered.get(request.request_id, [])[: self._room(request)] for request in ready]
        self._head.primed = None if any(drafts) or (ready and self._head.primed) else arm
        self._hand_out(ready, drafts, arm.k)

    def _hand_out_history(self, ready: list[Request]) -> dict[str, str]:
        """Give requests with an earlier response their drafts; returns their drafters."""
        drafts = self._history.propose(ready, self._room, self._cost.threshold(max(len(ready), 1)))
        share = max(self.max_num_scheduled_tokens - len(self.running), 0) // max(len(drafts), 1)
        for request in ready:
            if request.request_id in drafts:
                request.spec_token_ids = drafts[request.request_id].token_ids[:share]
        return {name: draft.drafter for name, draft in drafts.items()}

    def _hand_out(self, requests: list[Request], drafts: list[list[int]], k: int) -> None:
        # Others may still hold drafts that were not scheduled in the last step; they get new ones here.
        reusing = [request for request in self.running if request.request_id in self._from_history]
        rows = len(requests) + sum(1 + len(request.spec_token_ids) for request in reusing)
        budget = max(self.max_num_scheduled_tokens - rows, 0)
        for request, draft in zip(requests, drafts, strict=True):
            request.spec_token_ids = draft[: min(k, budget)]
            budget -= len(request.spec_token_ids)

    def _room(self, request: Request) -> int:
        """Most draft tokens that the request can use: the step emits one more than it accepts."""
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
        self._backoff = DraftBackoff()

    def update_from_output(self, scheduler_output: SchedulerOutput, output: ModelRunnerOutput) -> Any:
        step, self._in_flight = self._in_flight, None
        sampled = output.sampled_token_ids
        emitted = sum(map(len, sampled))
        self._record_history(scheduler_output, output)
        for name in scheduler_output.scheduled_spec_decode_tokens:
            new = len(sampled[output.req_id_to_index[name]])
            if new and name in self._accepted:
                if step is not None:
                    step.record_verified(name, new - 1)
                first = self.requests[name].num_output_tokens
                self._accepted[name].extend(range(first, first + new - 1))
        outputs = super().update_from_output(scheduler_output, output)
        self._head.emitted += emitted
        if step is not None:
            step.emitted = emitted
            self._unmeasured = step
            if not self.has_unfinished_requests():
                self._measure(time.perf_counter())  # the next step may begin much later
        return outputs

    def _record_history(self, scheduled: SchedulerOutput, output: ModelRunnerOutput) -> None:
        for name, index in output.req_id_to_index.items():
            tokens = output.sampled_token_ids[index]
            if tokens and name in self._history:
                drafted = len(scheduled.scheduled_spec_decode_tokens.get(name, ()))
                assert output.logprobs is not None  # every request of ours asks for them
                kept_marks = output.logprobs.slice_request(index, len(tokens)).sampled_token_ranks
                self._history.record_verified(self.requests[name], drafted, tokens, bool(kept_marks[-1]))

    def _measure(self, now: float) -> None:
        """The last step ends where this one begins, so that all that the engine does for a step is counted."""
        if self._unmeasured is None:
            return
        step, self._unmeasured = self._unmeasured, None
        seconds = now - step.started
        saved = self._cost.saved(step.batch, step.emitted, seconds) if step.pure and step.drafted else 0.0
        step.add_to(self.counts, seconds, saved)
        self.timeline.append(TimelineStep(step.started, step.batch, str(step.arm), step.emitted))
        if step.is_typical:
            self._cost.observe(step.batch, step.drafted, seconds)
            if not step.from_history:
                self.controller.observe(step.observation(seconds))

    def state(self) -> LearnedSpeculation:
        """What the rule in use has learned."""
        return LearnedSpeculation(self._adaptive, self.controller.state())

    def restore(self, state: LearnedSpeculation) -> None:
        """Continue from what `state` returned; what another rule has learned is of no use and is ignored."""
        if state.adaptive == self._adaptive:
            self.controller.restore(state.learned)

    def take_counts(self) -> SpeculationCounts:
        """Totals since the last call."""
        counts, self.counts = self.counts, SpeculationCounts()
        counts.chosen = Counter({(bucket, str(arm)): steps for (bucket, arm), steps in self.controller.counts.items()})
        counts.drafter_version = self._drafter_version
        self.controller.counts.clear()
        return counts
