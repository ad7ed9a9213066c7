"""One rollout engine: a vLLM engine in this process, fed with token ids and seeds. `RolloutFleet` runs the actors."""

import dataclasses
import os
import time
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.hub import local_folder, pin
from rollout.engine.vllm_options import check_sampling_options, check_vllm_options
from rollout.quantization.quantization_settings import quantization_arguments
from rollout.speculation.bandit import EAGLE
from rollout.speculation.eagle import head_arguments
from rollout.speculation.head_weights import PackedHead
from rollout.types import (
    GROUP_KEY,
    LENIENCE_KEY,
    PAST_KEY,
    SEED_KEY,
    SPECULATION_KEY,
    Rollout,
    RolloutRequest,
    TokenSource,
)
from rollout.weight_transfer.checksum import combine

if TYPE_CHECKING:
    from rollout.quantization.int8 import Rounding


@dataclasses.dataclass(frozen=True)
class EngineEnvironment:
    """What an engine needs to know of the machine; filled in by the program that knows it."""

    env: dict[str, str]  # environment variables of the engine's process
    gpus: float  # GPUs that Ray sets aside for one engine; 0 on CPU
    dtype: str  # vLLM's dtype name, e.g. "float32"
    weight_sync: str  # "shm" | "ipc" | "nccl"
    vocab_limit: int  # token ids from this one on are never sampled: the size of the tokenizer
    vllm: dict[str, Any]  # vLLM options that suit the machine; those of `rollout.vllm` come on top
    shared_gpus: tuple[
        str, ...
    ] = ()  # ids of a node's GPUs that engines share with the trainer, see `rollout.fleet.placement`


@dataclasses.dataclass(frozen=True)
class TimedGeneration:
    """Rollouts and how long they took."""

    rollouts: list[Rollout]
    seconds: float
    full_tokens: int  # emitted while as many requests were live as allowed
    full_seconds: float


def engine_arguments(
    config: Config,
    environment: EngineEnvironment,
    model_path: str,
    drafter_path: str | None = None,
    engine: int = 0,
) -> dict[str, Any]:
    """The arguments of vLLM's `EngineArgs` for that engine of the fleet.

    `drafter_path` is the folder of an EAGLE head, None: `drafter.path`.

    Raises ConfigError, see `check_vllm_options`, `check_sampling_options`, `eagle.head_arguments` and
    `quantization_arguments`.
    """
    check_vllm_options(config.rollout.vllm)
    check_sampling_options(config.rollout.sampling)
    arguments: dict[str, Any] = {
        "max_model_len": config.data.max_prompt_tokens + config.rollout.max_tokens,
        "disable_log_stats": True,
        **environment.vllm,
        **config.rollout.vllm,
        "model": model_path,
        "dtype": environment.dtype,
        "tensor_parallel_size": config.rollout.tp_size,
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": {"backend": environment.weight_sync},
        "worker_extension_cls": "rollout.engine.worker.WorkerExtension",
    }
    if config.rollout.tp_size > 1:
        # In a Ray actor vLLM would place its workers through Ray; as children they die with the actor.
        arguments["distributed_executor_backend"] = "mp"
    arguments |= quantization_arguments(config, engine, model_path, environment.dtype)
    return arguments | _speculation_arguments(config, drafter_path)


def _speculation_arguments(config: Config, drafter_path: str | None) -> dict[str, Any]:
    speculation, history = config.rollout.speculation, config.rollout.history
    drafts, reuses = speculation.adaptive != "off", history.mode != "off"
    if not drafts and not reuses:
        return {}
    drafter = {"method": "custom_class", "model": "rollout.speculation.no_drafts.NoDrafts"}
    if speculation.uses_head:
        drafter = head_arguments(config, drafter_path)
    longest = max(speculation.max_draft_tokens if drafts else 0, history.max_draft_tokens if reuses else 0)
    return {
        "speculative_config": drafter | {"num_speculative_tokens": longest},
        "scheduler_cls": "rollout.speculation.scheduler.SpeculativeScheduler",
        "async_scheduling": False,
        "additional_config": {
            SPECULATION_KEY: {
                "adaptive": speculation.adaptive,
                "drafters": speculation.drafters if drafts else [],
                "history_tokens": history.max_draft_tokens if reuses else 0,
                "max_draft_tokens": speculation.max_draft_tokens,
                "max_bytes": speculation.memory_mb * 2**20,
                "seed": config.train.seed,
            }
        },
    }


class RolloutEngine:
    """Generates one response per request. All methods run in the actor's one thread, in the order of the calls."""

    def __init__(
        self,
        arguments: dict[str, Any],
        coupled: bool = True,
        sampling: dict[str, Any] | None = None,
        precision: str = "none",
    ) -> None:
        """`arguments`: see `engine_arguments`. Does nothing yet, because an actor's errors are clearer in a method.

        `coupled` samples with each request's seed (otherwise by vLLM's own rules); `sampling` are further options of
        vLLM's SamplingParams for every request; `precision`, by the names of `rollout.quantization`, is what rollouts
        are marked with.
        """
        self._arguments, self._coupled, self._sampling = arguments, coupled, sampling or {}
        self._precision = precision
        self._limit: int | None = None
        self._internal_names: dict[str, str] = {}
        self._running: dict[str, RolloutRequest] = {}
        self._submitted = 0
        self._policy_version = 0

    def start(self) -> int:
        """Load the model; returns how many requests can run at the same time.

        Raises ConfigError for options that vLLM refuses and a missing model, and whatever else vLLM raises.
        """
        from vllm import EngineArgs, LLMEngine

        model = str(local_folder(pin(self._arguments["model"])))  # each node has its own copy of a model on the hub
        try:
            engine_config = EngineArgs(**self._arguments | {"model": model}).create_engine_config()
        except ValidationError as error:
            reasons = "; ".join(part["msg"] for part in error.errors())
            raise ConfigError(f"vLLM refuses the engine's options (rollout.vllm): {reasons}") from None
        self._llm = LLMEngine.from_vllm_config(engine_config, disable_log_stats=self._arguments["disable_log_stats"])
        self._stop_ids = self._eos_token_ids()
        if self._speculates and EAGLE not in self._arguments["additional_config"][SPECULATION_KEY]["drafters"]:
            # The scheduler drafts: the worker need not be asked after every step whether it did.
            self._llm.engine_core.engine_core.check_for_draft_tokens = False
        max_requests: int = self._llm.vllm_config.scheduler_config.max_num_seqs
        return max_requests

    def _eos_token_ids(self) -> list[int]:
        # vLLM adds those of generation_config.json itself.
        eos = self._llm.model_config.hf_config.eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    def pid(self) -> int:
        """The process id."""
        return os.getpid()

    def set_policy_version(self, version: int) -> None:
        """The number that rollouts submitted from now on carry."""
        self._policy_version = version

    def submit(self, requests: list[RolloutRequest]) -> None:
        """Queue requests; none of them, with a ValueError, when one does not fit the engine's length or vocabulary.

        One that has begun elsewhere or earlier goes on after its tokens, and its rollout has the new ones alone. Noise
        belongs to places in the sequence, so nothing else has to be said about where it goes on.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for request in requests:
            self._check(request)
        for request in requests:
            parameters = SamplingParams(
                temperature=request.temperature,
                max_tokens=min(request.max_tokens, self._limit or request.max_tokens) - len(request.begun),
                stop_token_ids=[] if request.ignore_eos else self._stop_ids,
                ignore_eos=request.ignore_eos,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args=self._extra_arguments(request),
                **self._sampling_after(len(request.begun)),
            )
            self._submitted += 1
            name = str(self._submitted)
            prompt = {"prompt_token_ids": request.prompt_ids + request.begun}
            self._internal_names[name] = self._llm.add_request(name, prompt, parameters)
            self._running[name] = request

    def _sampling_after(self, tokens: int) -> dict[str, Any]:
        """`rollout.sampling` for a response that has so many tokens already."""
        shortest = self._sampling.get("min_tokens", 0)
        return self._sampling | ({"min_tokens": max(shortest - tokens, 0)} if shortest else {})

    def shorten(self, limit: int | None) -> None:
        """End all responses, also those submitted later, at so many tokens, or where they are if longer; None: do not.

        A rollout that is shorter than its request's `max_tokens` and did not stop by itself was ended by this.
        """
        self._limit = limit
        if limit is not None:
            for request in self._scheduler.requests.values():
                request.max_tokens = min(request.max_tokens, limit)

    def sleep(self, level: int) -> None:
        """Leave the accelerator's memory to others, as vLLM's sleep mode does: see `rollout.sleep`.

        Raises RuntimeError while requests are running.
        """
        if self._running:
            raise RuntimeError(f"{len(self._running)} requests are still running; an engine sleeps between them.")
        self._llm.sleep(level)

    def wake_up(self, part: str) -> None:
        """Take back the memory of one part: `weights`, then, after a weight update, `kv_cache`."""
        self._llm.wake_up([part])

    def _extra_arguments(self, request: RolloutRequest) -> dict[str, Any]:
        seed = {SEED_KEY: request.seed} if self._coupled else {}
        past = {PAST_KEY: request.past} if request.past is not None else {}
        lenience = {LENIENCE_KEY: request.lenience} if request.lenience is not None else {}
        return {GROUP_KEY: request.prompt_id} | seed | past | lenience

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
        """Generate for that long, or until nothing is left to do; returns what finished meanwhile."""
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

    def take_speculation_counts(self) -> Any:
        """`SpeculationCounts` since the last call, or None when the engine does not speculate."""
        return self._scheduler.take_counts() if self._speculates else None

    def speculation_state(self) -> dict[str, Any] | None:
        """What adaptive speculation has learned, as plain values; None when the engine does not speculate."""
        return self._scheduler.state() if self._speculates else None

    def restore_speculation(self, state: dict[str, Any]) -> None:
        """Take over what `speculation_state` returned."""
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
                under_way = sum(request.num_output_tokens for request in self._scheduler.requests.values())
                full = sum(len(rollout.token_ids) for rollout in rollouts) + under_way, time.perf_counter() - start
        seconds = time.perf_counter() - start
        return TimedGeneration(rollouts, seconds, *(full or (0, 0.0)))

    def set_speculation(self, adaptive: str, max_draft_tokens: int, drafters: list[str] | None = None) -> None:
        """Draft by this rule from now on, with what the rule has learned but no text remembered: for benchmarks.

        `drafters` are some of the configured ones, None: all.
        """
        self._scheduler.set_speculation(adaptive, max_draft_tokens, drafters)

    def speculation_timeline(self) -> list[tuple[float, int, str, int]]:
        """The last generation's steps: (start in seconds, live requests, chosen arm, tokens emitted)."""
        return list(self._scheduler.timeline)

    def take_verify_seconds(self) -> float:
        """Seconds spent sampling and verifying since the last call (measured with MEGATRON_RL_PROFILE=1)."""
        seconds: float = self._llm.collective_rpc("take_verify_seconds")[0]
        return seconds

    def take_unfinished(self) -> list[Rollout]:
        """End all requests; returns what there is of those that have begun, with finish reason "unfinished"."""
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
        """vLLM's weight-sync protocol. Raises RuntimeError while requests are running."""
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
        self._llm.reset_prefix_cache()  # or leave it while requests need it: what it makes worse are drafts

    def stop(self) -> None:
        """Let vLLM's worker processes end in good order: killed, they leave their shared memory behind."""
        self._llm.engine_core.shutdown()

    def weight_rounding(self) -> list[dict[str, "Rounding"]]:
        """What int8 did to the weights of each layer, by its name in vLLM, per worker; empty where it is not used."""
        parts: list[dict[str, Rounding]] = self._llm.collective_rpc("weight_rounding")
        return parts

    def checksums(self) -> dict[str, int]:
        """Checksum of every Hugging Face tensor as the model multiplies with it, see `weight_transfer/checksum.py`."""
        return combine(self._llm.collective_rpc("weight_checksums"))
