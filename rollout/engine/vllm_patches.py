"""The one place that changes vLLM. Nine functions for engines of ours, all but one about which token is sampled, or
when, and four for engines of others (at the end):

- `GPUModelRunner._sample`: plain sampling and the verification of drafts are one call of `rollout.sampling.verify`.
- `SpecDecodeBaseProposer._sample_draft_tokens`: draft models and EAGLE heads draw with the same noise, so that a draft
  agrees whenever drafter and policy agree, also at temperature 1.
- `rejection_sampler.expand_batch_to_tokens`, on CPU, for `rollout.sampler: rejection`: vLLM 0.32 leaves its result
  uninitialised there, which gives drafts the wrong temperature.
- `GPUModelRunner.execute_model`: a step without drafts takes the plain path, also in an engine that could draft, unless
  an EAGLE head is to draft after it. And no length is too long for the head: vLLM would hand out drafts of zeros to all
  requests as soon as one is near its end, although positions past the end are taken care of. And what the scheduler
  asks to be judged by the lenient rule (`rollout.sampling.lenient`) is taken along to `_sample`.
- `GPUModelRunner.propose_draft_token_ids`: where the scheduler lets the EAGLE head rest (`eagle.RESTS`), it does not
  run. With K = 0, vLLM's own way, it would still make its first pass, to keep its keys and values complete.
- `SpecDecodeBaseProposer._maybe_share_embeddings`, `_maybe_share_lm_head`: the head always reads the policy's
  embedding, and the `lm_head` of an EAGLE-3 head is never the policy's. vLLM compares values: a copy of the embedding
  in the head's folder would stay as it is when the policy changes, and an `lm_head` that started as the policy's would
  be one with it, so that new weights for one would overwrite the other.
- `SamplingParams._validate_spec_decode`: vLLM refuses min-p and logit bias beside drafts, because its own verification
  lacks them; ours does not.
- `UnquantizedFusedMoEMethod._setup_kernel`, on CPU: vLLM 0.32 packs experts for its kernel when it loads them, but not
  when they get new weights, which the kernel would then read in the wrong places.
- For `rollout.engine.flashrl`: `EngineArgs.create_engine_config`, before which its settings go into the arguments
  (plugins are loaded when these exist already); `Worker.load_model`, after which a reload is tried;
  `Worker.reload_weights` and `finish_weight_update`, after which an output layer that vLLM forgets on CPU is renewed.

A request takes part in coupled sampling by carrying its seed, `SamplingParams(extra_args={"seed": 123})` (vLLM's own
`seed` keeps a generator's state per request, which a restart loses). The position key of a row is the position of its
input token.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import vllm
from jaxtyping import Int
from torch import Tensor
from vllm import EngineArgs, SamplingParams
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from rollout.sampling.lenient import Judged, verify_leniently
from rollout.sampling.logit_constraints import (
    Asked,
    Rows,
    asks_for_constraints,
    constrain,
    is_greedy,
    refuse_unsupported,
)
from rollout.sampling.verify import verify_tokens
from rollout.speculation import eagle
from rollout.speculation.no_drafts import NoDrafts
from rollout.types import SEED_KEY, SPECULATION_KEY

TESTED_VERSIONS = ("0.32.0",)
PROFILE = "MEGATRON_RL_PROFILE"
DRAFT_NOISE = "_megatron_rl_draft_noise"  # attribute of a proposer
JUDGED = "_megatron_rl_judged"  # attribute of a model runner: request id -> what the lenient rule has to decide


class VerifyClock:
    """Seconds spent in verification, when `MEGATRON_RL_PROFILE=1` asks for it: knowing them makes a GPU wait."""

    def __init__(self) -> None:
        self.enabled = os.environ.get(PROFILE) == "1"
        self.seconds = 0.0
        self._start = 0.0

    def _now(self) -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    def __enter__(self) -> None:
        if self.enabled:
            self._start = self._now()

    def __exit__(self, *error: object) -> None:
        if self.enabled:
            self.seconds += self._now() - self._start


verify_clock = VerifyClock()


def install_coupled_sampling(vocab_limit: int | None) -> None:
    """Replace the functions named above; token ids from `vocab_limit` on are never sampled. Idempotent.

    Requests without a seed are sampled by vLLM itself, below the same limit. Raises RuntimeError for an untested vLLM.
    """
    _check_version()
    if hasattr(GPUModelRunner._sample, "__wrapped__"):
        return
    _replace_sampling(vocab_limit)
    _replace_draft_sampling()
    _replace_execute_model()
    _replace_proposing()
    _replace_sharing()
    SamplingParams._validate_spec_decode = _validate_spec_decode
    if current_platform.is_cpu():
        rejection_sampler.expand_batch_to_tokens = _expand_batch_to_tokens
        _replace_packing()


def _replace_packing() -> None:
    original = UnquantizedFusedMoEMethod._setup_kernel

    @wraps(original)
    def set_up(self: Any, layer: Any, w13: Tensor, w2: Tensor) -> None:
        has_packed = self.moe_kernel is not None
        original(self, layer, w13, w2)
        if has_packed:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod._setup_kernel = set_up


def install_hooks(
    before_config: Callable[[Any], None], after_load: Callable[[Any], None], after_update: Callable[[Any], None]
) -> None:
    """Call the first with every `EngineArgs` before it is used, the others with every worker that has loaded its model,
    or got new weights.

    Idempotent. Raises RuntimeError for an untested vLLM.
    """
    _check_version()
    stock_create = EngineArgs.create_engine_config
    if hasattr(stock_create, "__wrapped__"):
        return

    @wraps(stock_create)
    def create_engine_config(engine_args: Any, *arguments: Any, **named: Any) -> Any:
        before_config(engine_args)
        return stock_create(engine_args, *arguments, **named)

    EngineArgs.create_engine_config = create_engine_config
    for name, after in (
        ("load_model", after_load),
        ("reload_weights", after_update),
        ("finish_weight_update", after_update),
    ):
        setattr(Worker, name, _followed(getattr(Worker, name), after))


def _followed(stock: Callable[..., None], after: Callable[[Any], None]) -> Callable[..., None]:
    @wraps(stock)
    def both(worker: Any, *arguments: Any, **named: Any) -> None:
        stock(worker, *arguments, **named)
        after(worker)

    return both


def _check_version() -> None:
    if vllm.__version__.split("+")[0] not in TESTED_VERSIONS:
        raise RuntimeError(
            f"This package changes functions of vLLM and was tested with vLLM {', '.join(TESTED_VERSIONS)}, but "
            f"{vllm.__version__} is installed; install a tested version."
        )


def _replace_sampling(vocab_limit: int | None) -> None:
    stock_sample = GPUModelRunner._sample

    def sample(runner: Any, logits: Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        asked = _asked(runner)
        seeds = _seeds(asked, runner.device)
        if seeds is None:
            _set_draft_noise(runner, None)
            if vocab_limit is not None:
                logits[:, vocab_limit:] = -torch.inf
            return stock_sample(runner, logits, spec_decode_metadata)
        return _coupled(runner, logits, asked, seeds, spec_decode_metadata, vocab_limit)

    sample.__wrapped__ = stock_sample  # type: ignore[attr-defined]
    GPUModelRunner._sample = sample


def _replace_draft_sampling() -> None:
    stock_sample_drafts = SpecDecodeBaseProposer._sample_draft_tokens

    def sample_drafts(proposer: Any, hidden_states: Tensor, metadata: SamplingMetadata) -> tuple[Tensor, Tensor | None]:
        noise: DraftNoise | None = getattr(proposer, DRAFT_NOISE, None)
        if noise is None or proposer.use_heterogeneous_vocab:
            return stock_sample_drafts(proposer, hidden_states, metadata)
        return noise.sample(proposer.model.compute_logits(hidden_states)), None

    SpecDecodeBaseProposer._sample_draft_tokens = sample_drafts


def _set_draft_noise(runner: Any, noise: "DraftNoise | None") -> None:
    if (proposer := getattr(runner, "drafter", None)) is not None:
        setattr(proposer, DRAFT_NOISE, noise)


def _replace_execute_model() -> None:
    stock_execute_model = GPUModelRunner.execute_model

    def execute_model(runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if SPECULATION_KEY in runner.vllm_config.additional_config:
            plain = _head_rests(runner, scheduler_output) and not scheduler_output.scheduled_spec_decode_tokens
            runner.speculative_config = None if plain else runner.vllm_config.speculative_config
            runner.effective_drafter_max_model_len = sys.maxsize
            setattr(runner, JUDGED, getattr(scheduler_output, "judged", {}))
        return stock_execute_model(runner, scheduler_output, *args, **kwargs)

    GPUModelRunner.execute_model = execute_model


def _head_rests(runner: Any, scheduler_output: Any) -> bool:
    rests: bool = scheduler_output.num_spec_tokens_to_schedule == eagle.RESTS
    return rests or isinstance(getattr(runner, "drafter", None), NoDrafts)


def _replace_proposing() -> None:
    stock_propose = GPUModelRunner.propose_draft_token_ids

    def propose_draft_token_ids(runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if _head_rests(runner, scheduler_output):
            return []
        return stock_propose(runner, scheduler_output, *args, **kwargs)

    GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids


def _replace_sharing() -> None:
    stock_share_embeddings = SpecDecodeBaseProposer._maybe_share_embeddings
    stock_share_lm_head = SpecDecodeBaseProposer._maybe_share_lm_head

    def share_embeddings(proposer: Any, policy: torch.nn.Module) -> None:
        if proposer.method in ("eagle", "eagle3"):
            proposer.model.has_own_embed_tokens = False
        stock_share_embeddings(proposer, policy)

    def share_lm_head(proposer: Any, policy: torch.nn.Module) -> None:
        own = getattr(proposer.model, "lm_head", None)
        stock_share_lm_head(proposer, policy)
        if proposer.method == "eagle3" and proposer.model.has_own_lm_head:
            proposer.model.lm_head = own

    SpecDecodeBaseProposer._maybe_share_embeddings = share_embeddings
    SpecDecodeBaseProposer._maybe_share_lm_head = share_lm_head


class DraftNoise:
    """The noise of the drafts that follow a sampling step: the place where each request goes on."""

    def __init__(self, seeds: Tensor, temperature: Tensor, positions: Tensor, vocab_limit: int | None) -> None:
        self._seeds, self._temperature, self._positions = seeds, temperature, positions
        self._vocab_limit = vocab_limit

    def sample(self, logits: Tensor) -> Int[Tensor, " requests"]:
        """One draft token per request, int64; the next call is for the tokens after them."""
        requests = len(logits)
        tokens, _, _ = verify_tokens(
            logits[:, : self._vocab_limit],
            torch.arange(requests + 1, dtype=torch.int32, device=logits.device),
            torch.empty(0, dtype=torch.int32, device=logits.device),
            self._temperature[:requests],
            self._seeds[:requests],
            self._positions[:requests],
            1,
        )
        self._positions = self._positions + 1
        return tokens[:, 0].long()


def _asked(runner: Any) -> list[Asked]:
    states = [runner.requests[request] for request in runner.input_batch.req_ids]
    return [Asked(state.sampling_params, len(state.output_token_ids)) for state in states]


def _seeds(asked: list[Asked], device: torch.device) -> Int[Tensor, " requests"] | None:
    """The seeds of the batch's requests, or None when no request has one; ValueError when only some do."""
    seeds = [(request.parameters.extra_args or {}).get(SEED_KEY) for request in asked]
    if None not in seeds:
        return torch.tensor(seeds, dtype=torch.int64, device=device)
    if any(seed is not None for seed in seeds):
        raise ValueError(f"Requests with and without extra_args[{SEED_KEY!r}] cannot run in one engine at a time.")
    return None


def _coupled(
    runner: Any,
    logits: Tensor,
    asked: list[Asked],
    seeds: Tensor,
    spec_decode_metadata: Any,
    vocab_limit: int | None,
) -> SamplerOutput:
    requests = len(seeds)
    runner.input_batch.update_async_output_token_ids()
    metadata: SamplingMetadata = runner.input_batch.sampling_metadata
    refuse_unsupported(metadata)
    cu_rows = torch.zeros(requests + 1, dtype=torch.int32, device=logits.device)
    if spec_decode_metadata is None:
        torch.arange(1, requests + 1, out=cu_rows[1:])
        draft_ids = torch.empty(0, dtype=torch.int32, device=logits.device)
        last_tokens = runner.query_start_loc.gpu[1 : requests + 1].long() - 1
        positions, max_rows = runner.positions[last_tokens].long(), 1
        counts = [0] * requests
    else:
        counts = spec_decode_metadata.num_draft_tokens
        cu_rows[1:] = spec_decode_metadata.cu_num_sampled_tokens
        draft_ids = spec_decode_metadata.draft_token_ids.to(torch.int32)
        first_rows = spec_decode_metadata.logits_indices[cu_rows[:-1].long()].long()
        positions, max_rows = runner.positions[first_rows].long(), spec_decode_metadata.max_spec_len + 1
    if metadata.temperature is None:  # vLLM's way to say that all are greedy
        temperature = torch.zeros(requests, device=logits.device)
    else:
        temperature = metadata.temperature[:requests].float()
        temperature = torch.where(is_greedy(temperature), 0.0, temperature)
    drawn_at = temperature
    if asks_for_constraints(metadata, asked):
        split = draft_ids.cpu().split(counts) if len(draft_ids) else [draft_ids] * requests
        rows = Rows.of([part.tolist() for part in split], logits.device)
        logits = constrain(logits, metadata, asked, rows, vocab_limit)
        drawn_at = torch.where(temperature == 0, 0.0, 1.0)  # the logits are already divided by it
    arguments = logits[:, :vocab_limit], cu_rows, draft_ids, drawn_at, seeds, positions, max_rows
    judged: dict[str, Judged] = getattr(runner, JUDGED, {})
    with verify_clock:
        if judged:
            by_request = [judged.get(request) for request in runner.input_batch.req_ids]
            (tokens, emitted, logprobs), marks = verify_leniently(by_request, *arguments, counts)
        else:
            tokens, emitted, logprobs = verify_tokens(*arguments)
            marks = torch.zeros(tokens.shape, dtype=torch.int64, device=tokens.device)
    _set_draft_noise(runner, DraftNoise(seeds, temperature, positions + emitted, vocab_limit))
    return SamplerOutput(tokens, _logprobs_tensors(tokens, logprobs, marks))


def _logprobs_tensors(tokens: Tensor, logprobs: Tensor, marks: Tensor) -> LogprobsTensors:
    """vLLM wants the tokens' ranks, which nobody here reads: their place is used to tell the scheduler the marks."""
    return LogprobsTensors(tokens.reshape(-1, 1).clamp(min=0), logprobs.reshape(-1, 1), marks.reshape(-1))


_stock_validate_spec_decode = SamplingParams._validate_spec_decode


def _validate_spec_decode(parameters: SamplingParams, speculative_config: Any) -> None:
    if SEED_KEY not in (parameters.extra_args or {}):
        _stock_validate_spec_decode(parameters, speculative_config)


def _expand_batch_to_tokens(
    values: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """values [requests] repeated for each request's draft tokens, with one value replaced."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
    replaced = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
    return replaced.repeat_interleave(counts, output_size=num_tokens)
