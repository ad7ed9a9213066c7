"""vLLM's scheduler with drafts: it proposes them, chooses how many are verified, and measures what every step gave.

Drafts are decided here, in the engine's one scheduling process, and travel to the workers with the schedule, so all
tensor-parallel ranks agree. Which tokens come out does not depend on any decision made here (see `rollout.verify`).
"""

import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from rollout.adaptive import PLAIN, Arm, Controller, Step, bucket_of, make_arms, make_controller
from rollout.ngram import NgramDrafter
from rollout.records import SpeculationCounts

SETTINGS = "megatron_rl_speculation"  # key of vLLM's additional_config
GROUP_KEY = "group"  # in SamplingParams.extra_args: requests of one group are samples of one prompt
NGRAM = "ngram"
TIMELINE_STEPS = 4096
# Where drafts have not paid for a while, making and weighing them at every step would be all they cost.
PATIENCE, LOOK_EVERY = 16, 4


@dataclass
class _Running:
    """The step under way."""

    arm: Arm
    started: float
    scheduled: SchedulerOutput
    drafts: dict[str, int]  # request id -> draft tokens
    pure: bool  # every request decodes: no prompt is computed


class SpeculativeScheduler(Scheduler):
    """Adds drafts to the running requests before each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Without a schedule of its own vLLM pads new requests to full drafts, of tokens that do not exist.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.scheduler_config.max_num_seqs + 1)
        self._controllers: dict[tuple[str, int], Controller] = {}
        self._settings: dict[str, Any] = self.vllm_config.additional_config[SETTINGS]
        self.set_speculation(self._settings["adaptive"], self._settings["max_draft_tokens"])
        self._numbers: dict[str, int] = {}  # request id -> number in the drafter
        self._accepted: dict[str, list[int]] = {}  # request id -> places of accepted drafts in its output
        self._started = 0
        self._plain_steps = 0  # steps in a row without a draft
        self._under_way: _Running | None = None
        self._last: tuple[_Running, int, int] | None = None  # a step whose time is not known yet: emitted, accepted
        self.timeline: deque[tuple[float, int, str, int]] = deque(maxlen=TIMELINE_STEPS)
        self.counts = SpeculationCounts()

    def set_speculation(self, adaptive: str, max_draft_tokens: int) -> None:
        """Use this rule, with what it learned before, and an empty drafter. For an engine without requests."""
        key = adaptive, max_draft_tokens
        if key not in self._controllers:
            self._controllers[key] = make_controller(
                adaptive, self._settings["drafters"], max_draft_tokens, self._settings["seed"]
            )
        self.controller = self._controllers[key]
        self._ngram = NgramDrafter(max_draft_tokens, self._settings["max_bytes"])
        self._arms = [arm for arm in make_arms([NGRAM], max_draft_tokens) if arm.k]

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        self._started += 1
        self._numbers[request.request_id] = self._started
        self._accepted[request.request_id] = []
        extra = (request.sampling_params.extra_args if request.sampling_params else None) or {}
        group = str(extra.get(GROUP_KEY, request.request_id))
        self._ngram.start(self._started, group, request.prompt_token_ids or [])

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        number = self._numbers.pop(request.request_id, None)
        if number is not None:
            self._ngram.finish(number)
        return super()._free_request(request, *args, **kwargs)

    def take_accepted(self, request_id: str) -> list[int]:
        """Places in a finished request's output whose tokens were drafts; forgets them."""
        return self._accepted.pop(request_id, [])

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        started = time.perf_counter()
        self._measure(started)
        arm = self._propose()
        self.counts.draft_seconds += time.perf_counter() - started
        scheduled = super().schedule(*args, **kwargs)
        drafts = {name: len(tokens) for name, tokens in scheduled.scheduled_spec_decode_tokens.items()}
        pure = not scheduled.scheduled_new_reqs and all(
            tokens == 1 + drafts.get(name, 0) for name, tokens in scheduled.num_scheduled_tokens.items()
        )
        self._under_way = _Running(arm, started, scheduled, drafts, pure)
        return scheduled

    def _propose(self) -> Arm:
        """Give each decoding request its draft; returns the arm that was chosen."""
        if self._plain_steps >= PATIENCE and self._plain_steps % LOOK_EVERY:
            self._plain_steps += 1
            self.controller.counts[bucket_of(len(self.running)), PLAIN] += 1
            return PLAIN
        ready = [request for request in self.running if not request.is_prefill_chunk]
        if not ready:
            return PLAIN
        threshold = self.controller.threshold(len(ready))
        numbers = [self._numbers[request.request_id] for request in ready]
        limits = [self._room(request) for request in ready]
        drafts = self._ngram.propose(numbers, limits, threshold)
        drafted, accepted = drafts.drafted.tolist(), drafts.accepted.tolist()
        arm = self.controller.choose(len(ready), {arm: (drafted[arm.k], accepted[arm.k]) for arm in self._arms})
        if arm.k == 0 or drafted[arm.k] == 0:
            self._plain_steps += 1
            return arm
        self._plain_steps = 0
        budget = max(self.max_num_scheduled_tokens - len(ready), 0)
        lengths = drafts.lengths[: len(ready)].tolist()
        for request, draft, length in zip(ready, drafts.tokens[: len(ready)].tolist(), lengths, strict=True):
            kept = min(length, arm.k, budget)
            budget -= kept
            request.spec_token_ids = draft[:kept]
        return arm

    def _room(self, request: Request) -> int:
        """Draft tokens that could still be of use: the step emits one more than it accepts."""
        length = min(self.max_model_len, request.num_prompt_tokens + request.max_tokens)
        return max(length - request.num_tokens - 1, 0)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """The workers' own drafts; there are none, see `rollout.no_drafts`."""

    def update_from_output(self, scheduler_output: SchedulerOutput, output: ModelRunnerOutput) -> Any:
        under_way, self._under_way = self._under_way, None
        sampled = output.sampled_token_ids
        emitted = accepted = 0
        numbers, tokens = [], []
        for name in scheduler_output.num_scheduled_tokens:
            new = sampled[output.req_id_to_index[name]] if sampled else []
            if not new or name not in self._numbers:
                continue
            numbers.append(self._numbers[name])
            tokens.append(new)
            emitted += len(new)
            if len(new) > 1:
                accepted += len(new) - 1
                first = self.requests[name].num_output_tokens
                self._accepted[name].extend(range(first, first + len(new) - 1))
        self._ngram.extend(numbers, tokens)
        outputs = super().update_from_output(scheduler_output, output)
        if under_way is not None:
            self._last = under_way, emitted, accepted
            if not self.has_unfinished_requests():
                self._measure(time.perf_counter())  # the next step may be long in coming
        return outputs

    def _measure(self, now: float) -> None:
        """The last step ends where this one begins, so that all the engine does for a step is counted."""
        if self._last is None:
            return
        (step, emitted, accepted), self._last = self._last, None
        batch, drafted = len(step.scheduled.num_scheduled_tokens), sum(step.drafts.values())
        seconds = now - step.started
        self.counts.steps += 1
        self.counts.verifications += batch
        self.counts.drafted += drafted
        self.counts.accepted += accepted
        self.counts.emitted += emitted
        self.counts.seconds += seconds
        self.timeline.append((step.started, batch, str(step.arm), emitted))
        if step.pure and emitted:
            self.controller.observe(Step(step.arm, batch, drafted, emitted, seconds))

    def take_counts(self) -> SpeculationCounts:
        """Totals since the last call."""
        counts, self.counts = self.counts, SpeculationCounts()
        counts.chosen = Counter({(bucket, str(arm)): steps for (bucket, arm), steps in self.controller.counts.items()})
        self.controller.counts.clear()
        return counts
