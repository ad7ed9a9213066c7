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
from rollout.records import GROUP_KEY, SPECULATION_KEY, SpeculationCounts

NGRAM = "ngram"
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
        self._controllers: dict[tuple[str, int], Controller] = {}
        self._settings: dict[str, Any] = self.vllm_config.additional_config[SPECULATION_KEY]
        self.set_speculation(self._settings["adaptive"], self._settings["max_draft_tokens"])
        self._numbers: dict[str, int] = {}  # request id -> number in the drafter
        self._told: dict[str, int] = {}  # request id -> output tokens that the drafter knows of
        self._accepted: dict[str, list[int]] = {}  # request id -> places of accepted drafts in its output
        self._started = 0
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
        self.controller, self._adaptive = self._controllers[key], adaptive
        self._rest = Rest()
        self._ngram = NgramDrafter(max_draft_tokens, self._settings["max_bytes"])
        self._arms = [arm for arm in make_arms([NGRAM], max_draft_tokens) if arm.k]

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        self._started += 1
        self._numbers[request.request_id] = self._started
        self._told[request.request_id] = request.num_output_tokens
        self._accepted[request.request_id] = []
        extra = (request.sampling_params.extra_args if request.sampling_params else None) or {}
        group = str(extra.get(GROUP_KEY, request.request_id))
        self._ngram.start(self._started, group, request.prompt_token_ids or [])

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if request.request_id in self._numbers:
            self._tell([request])
            del self._told[request.request_id]
            self._ngram.finish(self._numbers.pop(request.request_id))
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
        bucket = bucket_of(len(self.running))
        if self._rest.goes_on(bucket):
            self.controller.counts[bucket, PLAIN] += 1
            return PLAIN
        ready = [request for request in self.running if not request.is_prefill_chunk]
        if not ready:
            return PLAIN
        self._tell(ready)
        threshold = self.controller.threshold(len(ready))
        numbers = [self._numbers[request.request_id] for request in ready]
        limits = [self._room(request) for request in ready]
        drafts = self._ngram.propose(numbers, limits, threshold)
        drafted, accepted = drafts.drafted.tolist(), drafts.accepted.tolist()
        if not drafted[-1]:
            self.controller.counts[bucket_of(len(ready)), PLAIN] += 1
            return PLAIN
        arm = self.controller.choose(len(ready), {arm: (drafted[arm.k], accepted[arm.k]) for arm in self._arms})
        self._rest.looked(used=arm.k > 0 or not self.controller.knows(len(ready)))
        if not drafted[arm.k]:
            return arm
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
        emitted, accepted = sum(map(len, sampled)), 0
        for name in scheduler_output.scheduled_spec_decode_tokens:
            new = len(sampled[output.req_id_to_index[name]])
            if new > 1 and name in self._accepted:
                accepted += new - 1
                first = self.requests[name].num_output_tokens
                self._accepted[name].extend(range(first, first + new - 1))
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
        self.controller.counts.clear()
        return counts
