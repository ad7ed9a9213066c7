"""One rollout engine: a vLLM engine in this process, fed with token ids and seeds. `RolloutFleet` runs the actors."""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_rl.config import ConfigError
from megatron_rl.config.hub import local_folder, pin
from rollout.speculation.head_weights import PackedHead
from rollout.speculation.speculation_settings import LearnedSpeculation, SpeculationSettings
from rollout.types import RequestExtras, Rollout, RolloutRequest, SpeculationCounts, TimelineStep, TokenSource
from rollout.weight_transfer.checksum import combine

if TYPE_CHECKING:
    from rollout.quantization.int8 import Rounding


@dataclasses.dataclass(frozen=True)
class TimedGeneration:
    """Rollouts and how long they took."""

    rollouts: list[Rollout]
    seconds: float
    full_tokens: int
    """Emitted while as many requests were live as allowed."""
    full_seconds: float
    """Duration of that time."""


class RolloutEngine:
    """Generates one response per request. All methods run in the actor's one thread, in the order of the calls."""

    def __init__(
        self,
        arguments: dict[str, Any],
        coupled: bool = True,
        sampling: dict[str, Any] | None = None,
        precision: str = "none",
        end_ids: Sequence[int] = (),
    ) -> None:
        """Note the options; `start` loads the model, because an actor's errors are clearer in a method.

        Args:
            arguments: see `engine_arguments`.
            coupled: sample with each request's seed; otherwise by vLLM's own rules.
            sampling: further options of vLLM's SamplingParams for every request.
            precision: what rollouts are marked with, by the names of `rollout.quantization`.
            end_ids: token ids that end a response; what the model's files say does not count.
        """
        self._arguments, self._coupled, self._sampling = arguments, coupled, sampling or {}
        self._precision, self._end_ids = precision, list(end_ids)
        self._limit: int | None = None
        self._internal_names: dict[str, str] = {}
        self._running: dict[str, RolloutRequest] = {}
        self._submitted = 0
        self._policy_version = 0

    def start(self) -> int:
        """Load the model; returns how many requests can run at the same time.

        Raises:
            ConfigError: vLLM refuses an option, or the model is missing.
            Exception: whatever else vLLM raises.
        """
        from vllm import EngineArgs, LLMEngine

        model = str(local_folder(pin(self._arguments["model"])))  # each node has its own copy of a model on the hub
        try:
            engine_config = EngineArgs(**self._arguments | {"model": model}).create_engine_config()
        except ValidationError as error:
            reasons = "; ".join(part["msg"] for part in error.errors())
            raise ConfigError(f"vLLM refuses the engine's options (rollout.vllm): {reasons}") from None
        self._llm = LLMEngine.from_vllm_config(engine_config, disable_log_stats=self._arguments["disable_log_stats"])
        # Or vLLM would add those of generation_config.json, which the trainer has reconciled with the others.
        self._llm.input_processor.generation_config_fields = {}
        settings = SpeculationSettings.from_vllm(self._arguments.get("additional_config", {}))
        if settings is not None and not settings.uses_head:
            # The scheduler drafts: no need to query the worker after every step for drafts.
            self._llm.engine_core.engine_core.check_for_draft_tokens = False
        max_requests: int = self._llm.vllm_config.scheduler_config.max_num_seqs
        return max_requests

    def pid(self) -> int:
        """The process id."""
        return os.getpid()

    def set_policy_version(self, version: int) -> None:
        """The number that rollouts submitted from now on carry."""
        self._policy_version = version

    def submit(self, requests: list[RolloutRequest]) -> None:
        """Queue requests.

        A request with `partial_ids` continues after them, and its rollout has the new tokens alone. The noise depends
        on the position in the sequence, so it is the same as if the response had been generated in one go.

        Raises:
            ValueError: a request does not fit the engine's length or vocabulary; none of the requests is queued.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for request in requests:
            self._check(request)
        for request in requests:
            parameters = SamplingParams(
                temperature=request.temperature,
                max_tokens=min(request.max_tokens, self._limit or request.max_tokens) - len(request.partial_ids),
                stop_token_ids=[] if request.ignore_eos else self._end_ids,
                ignore_eos=request.ignore_eos,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args=self._extra_arguments(request),
                **self._sampling_after(len(request.partial_ids)),
            )
            self._submitted += 1
            name = str(self._submitted)
            prompt = {"prompt_token_ids": request.prompt_ids + request.partial_ids}
            self._internal_names[name] = self._llm.add_request(name, prompt, parameters)
            self._running[name] = request

    def _sampling_after(self, tokens: int) -> dict[str, Any]:
        """`rollout.sampling` for a response that already has this number of tokens."""
        shortest = self._sampling.get("min_tokens", 0)
        return self._sampling | ({"min_tokens": max(shortest - tokens, 0)} if shortest else {})

    def shorten(self, limit: int | None) -> None:
        """Limit the length of all responses, also of those submitted later; longer ones end where they are.

        A rollout that is shorter than its request's `max_tokens` and did not stop by itself was ended by this.

        Args:
            limit: in tokens; None: no limit.
        """
        self._limit = limit
        if limit is not None:
            for request in self._scheduler.requests.values():
                request.max_tokens = min(request.max_tokens, limit)

    def sleep(self, level: int) -> None:
        """Release the accelerator's memory, as vLLM's sleep mode does: see `rollout.sleep`.

        Raises:
            RuntimeError: requests are running.
        """
        if self._running:
            raise RuntimeError(f"{len(self._running)} requests are still running; an engine sleeps between them.")
        self._llm.sleep(level)

    def wake_up(self, part: str) -> None:
        """Allocate the memory of one part again: `weights`, then, after a weight update, `kv_cache`."""
        self._llm.wake_up([part])

    def _extra_arguments(self, request: RolloutRequest) -> dict[str, Any]:
        seed = request.seed if self._coupled else None
        return RequestExtras(seed, request.prompt_id, request.past, request.lenience).to_dict()

    def _check(self, request: RolloutRequest) -> None:
        model = self._llm.model_config
        name = f"request {request.sample_index} of prompt {request.prompt_id!r}"
        if not request.prompt_ids or len(request.prompt_ids) + request.max_tokens > model.max_model_len:
            raise ValueError(
                f"{name} has {len(request.prompt_ids)} prompt tokens and may generate {request.max_tokens}, but the "
                f"engine takes 1 to {model.max_model_len} in all (rollout.vllm.max_model_len)."
            )
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < model.get_vocab_size():
            raise ValueError(f"{name} has token ids outside the model's vocabulary of {model.get_vocab_size()}.")

    def poll(self, seconds: float) -> list[Rollout]:
        """Generate for that long, or until no request is left; returns what has finished."""
        deadline = time.monotonic() + seconds
        finished: list[Rollout] = []
        while self._running and time.monotonic() < deadline:
            finished.extend(self._rollout(output) for output in self._step() if output.finished)
        return finished

    def _step(self) -> Any:
        try:
            return self._llm.step()
        except Exception:
            if getattr(self._llm.model_executor, "is_failed", False):
                # A worker process died: end this one too, so that the fleet sees one kind of death.
                os._exit(1)
            raise

    def _rollout(self, output: Any) -> Rollout:
        request = self._running.pop(output.request_id)
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        internal_name = self._internal_names.pop(output.request_id)
        sources = [TokenSource.FRESH] * len(tokens)
        if self._speculates:
            sources = self._scheduler.take_sources(internal_name, len(tokens))
        return Rollout(
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            epoch=request.epoch,
            seed=request.seed,
            prompt_ids=request.prompt_ids,
            token_ids=tokens,
            logprobs=[entry[token].logprob for token, entry in zip(tokens, completion.logprobs, strict=True)],
            finish_reason=completion.finish_reason,
            policy_version=self._policy_version,
            sources=sources,
            precisions=[(self._precision, len(tokens))],
            versions=[(self._policy_version, len(tokens))],
        )

    @property
    def _speculates(self) -> bool:
        return "scheduler_cls" in self._arguments

    @property
    def _scheduler(self) -> Any:
        # The engine core runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0).
        return self._llm.engine_core.engine_core.scheduler

    def take_speculation_counts(self) -> SpeculationCounts | None:
        """What drafting did since the last call, or None when the engine does not draft."""
        return self._scheduler.take_counts() if self._speculates else None

    def speculation_state(self) -> LearnedSpeculation | None:
        """What adaptive speculation has learned; None when the engine does not draft."""
        return self._scheduler.state() if self._speculates else None

    def restore_speculation(self, state: LearnedSpeculation) -> None:
        """Continue from what `speculation_state` returned."""
        if self._speculates:
            self._scheduler.restore(state)

    def generate_timed(self, requests: list[RolloutRequest], concurrency: int | None = None) -> TimedGeneration:
        """Generate all of them, at most `concurrency` at a time, and measure: for benchmarks."""
        waiting = requests[::-1]
        live = len(requests) if concurrency is None else concurrency
        if self._speculates:
            self._scheduler.timeline.clear()
        rollouts: list[Rollout] = []
        full: tuple[int, float] | None = None
        start = time.perf_counter()
        while waiting or self._running:
            if waiting and len(self._running) < live:
                self.submit([waiting.pop() for _ in range(min(live - len(self._running), len(waiting)))])
            rollouts += [self._rollout(output) for output in self._step() if output.finished]
            if full is None and not waiting and len(self._running) < live:
                unfinished = sum(request.num_output_tokens for request in self._scheduler.requests.values())
                full = sum(len(rollout.token_ids) for rollout in rollouts) + unfinished, time.perf_counter() - start
        seconds = time.perf_counter() - start
        return TimedGeneration(rollouts, seconds, *(full or (0, 0.0)))

    def set_speculation(self, adaptive: str, max_draft_tokens: int, drafters: list[str] | None = None) -> None:
        """Draft by this rule from now on, with what it has learned but an empty n-gram index: for benchmarks.

        Args:
            adaptive: as `rollout.speculation.adaptive`.
            max_draft_tokens: per request and step.
            drafters: some of the configured ones; None: all.
        """
        self._scheduler.set_speculation(adaptive, max_draft_tokens, drafters)

    def speculation_timeline(self) -> list[TimelineStep]:
        """The last generation's steps."""
        return list(self._scheduler.timeline)

    def take_verify_seconds(self) -> float:
        """Seconds spent sampling and verifying since the last call (measured with MEGATRON_RL_PROFILE=1)."""
        seconds: float = self._llm.collective_rpc("take_verify_seconds")[0]
        return seconds

    def take_unfinished(self) -> list[Rollout]:
        """End all requests; returns those that have tokens, with finish reason "unfinished"."""
        from vllm.v1.engine import FinishReason

        states = self._llm.output_processor.request_states
        running = [states[self._internal_names[name]] for name in self._running]
        outputs = [state.make_request_output([], None, FinishReason.ABORT, None) for state in running]
        self._llm.abort_request(list(self._running))
        ended = [dataclasses.replace(self._rollout(output), finish_reason="unfinished") for output in outputs]
        return [rollout for rollout in ended if rollout.token_ids]

    def init_weight_transfer_engine(self, request: Any) -> None:
        """vLLM's weight-sync protocol; `request` is its `WeightTransferInitRequest`."""
        self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": request.init_info})

    def start_weight_update(self) -> None:
        """vLLM's weight-sync protocol.

        Raises:
            RuntimeError: requests are running.
        """
        if self._running:
            raise RuntimeError(f"{len(self._running)} requests are still running; finish or abort them before a sync.")
        self._llm.collective_rpc("start_weight_update")

    def update_weights(self, request: Any) -> None:
        """vLLM's weight-sync protocol; `request` is its `WeightTransferUpdateRequest`."""
        self._llm.collective_rpc("update_weights", kwargs={"update_info": request.update_info})

    def finish_weight_update(self) -> None:
        """vLLM's weight-sync protocol; keys and values cached under the old weights are dropped."""
        self._llm.collective_rpc("finish_weight_update")
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM could not drop its prefix cache after a weight update.")

    def update_drafter(self, head: PackedHead, version: int) -> None:
        """Load new weights for the EAGLE head, see `RolloutFleet.update_drafter`.

        Also while requests are running: their tokens stay the same.
        """
        self._llm.collective_rpc("load_head", args=(head,))
        self._scheduler.renew_head(version)
        self._llm.reset_prefix_cache()  # fails while requests need the cache, which makes drafts worse, not tokens

    def stop(self) -> None:
        """Shut vLLM's worker processes down: if killed, they would leave their shared memory behind."""
        self._llm.engine_core.shutdown()

    def weight_rounding(self) -> list[dict[str, "Rounding"]]:
        """What int8 did to the weights of each layer, by its name in vLLM, per worker; empty where it is not used."""
        parts: list[dict[str, Rounding]] = self._llm.collective_rpc("weight_rounding")
        return parts

    def checksums(self) -> dict[str, int]:
        """Checksum of every Hugging Face tensor as the model multiplies with it, see `weight_transfer/checksum.py`."""
        return combine(self._llm.collective_rpc("weight_checksums"))
