"""The one place that changes vLLM: its V1 model runner's `_sample` goes through coupled sampling.

A request takes part by carrying its seed, `SamplingParams(extra_args={"seed": 123})` (vLLM's own `seed` keeps a
generator's state per request, which a restart loses). The position key of a row is the position of its input token.
"""

from typing import Any

import torch
import vllm
from jaxtyping import Float, Int
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from rollout.noise import coupled_sample

TESTED_VERSIONS = ("0.32.0",)
SEED_KEY = "seed"


def install_coupled_sampling(vocab_limit: int | None) -> None:
    """Replace `GPUModelRunner._sample`; token ids from `vocab_limit` on are never sampled. Idempotent.

    Requests without a seed are sampled by vLLM itself, below the same limit. Raises RuntimeError for an untested vLLM.
    """
    if vllm.__version__.split("+")[0] not in TESTED_VERSIONS:
        raise RuntimeError(
            f"Coupled sampling changes vLLM's model runner and was tested with vLLM {', '.join(TESTED_VERSIONS)}, "
            f"but {vllm.__version__} is installed; install a tested version."
        )
    if hasattr(GPUModelRunner._sample, "__wrapped__"):
        return
    stock_sample = GPUModelRunner._sample

    def sample(runner: Any, logits: Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        if vocab_limit is not None:
            logits[:, vocab_limit:] = -torch.inf
        seeds = _seeds(runner)
        if seeds is None:
            return stock_sample(runner, logits, spec_decode_metadata)
        metadata = runner.input_batch.sampling_metadata
        refuse_unsupported(metadata, spec_decode_metadata)
        return _coupled(runner, logits, seeds, metadata)

    sample.__wrapped__ = stock_sample  # type: ignore[attr-defined]
    GPUModelRunner._sample = sample


def refuse_unsupported(metadata: SamplingMetadata, spec_decode_metadata: Any) -> None:
    """Raise ValueError, naming the option, when a batch with seeds asks for what coupled sampling lacks."""
    processors = metadata.logitsprocs.argmax_invariant + metadata.logitsprocs.non_argmax_invariant
    asked = {
        "draft tokens": spec_decode_metadata is not None,
        "top_k": metadata.top_k is not None,
        "top_p": metadata.top_p is not None,
        "presence, frequency or repetition penalties": not metadata.no_penalties,
        "allowed_token_ids": metadata.allowed_token_ids_mask is not None,
        "bad_words": bool(metadata.bad_words_token_ids),
        "min_p, min_tokens, logit_bias or another logits processor": any(map(_is_active, processors)),
        "more than the sampled token's log-probability": (metadata.max_num_logprobs or 0) > 0,
        "logprob_token_ids": bool(metadata.logprob_token_ids),
        "a thinking budget": _tracks_thinking(metadata),
    }
    if unsupported := [name for name, present in asked.items() if present]:
        raise ValueError(
            f"Coupled sampling (a request with extra_args[{SEED_KEY!r}]) does not support {'; '.join(unsupported)}: "
            "leave it out, or send the request without the seed."
        )


def _is_active(processor: Any) -> bool:
    # vLLM's own processors are always loaded, and each keeps its own record of the requests that use it.
    for record in ("min_p_count", "min_toks", "biases"):
        if hasattr(processor, record):
            return bool(getattr(processor, record))
    return True


def _tracks_thinking(metadata: SamplingMetadata) -> bool:
    holder = metadata.thinking_budget_state_holder
    return holder is not None and holder.has_tracked_requests()


def _seeds(runner: Any) -> Int[Tensor, " rows"] | None:
    """The seeds of the batch's requests, or None when no request has one; ValueError when only some do."""
    extras = [runner.requests[request].sampling_params.extra_args or {} for request in runner.input_batch.req_ids]
    seeds = [extra.get(SEED_KEY) for extra in extras]
    if None not in seeds:
        return torch.tensor(seeds, dtype=torch.int64, device=runner.device)
    if any(seed is not None for seed in seeds):
        raise ValueError(f"Requests with and without extra_args[{SEED_KEY!r}] cannot run in one engine at a time.")
    return None


def _coupled(
    runner: Any, logits: Float[Tensor, "rows vocab"], seeds: Int[Tensor, " rows"], metadata: SamplingMetadata
) -> SamplerOutput:
    rows = len(seeds)
    last_rows = runner.query_start_loc.gpu[1 : rows + 1].long() - 1
    positions = runner.positions[last_rows].long()
    if metadata.temperature is None:  # vLLM's way to say that all are greedy
        temperature = torch.zeros(rows, device=logits.device)
    else:
        # vLLM treats temperatures below 1e-5 as greedy.
        temperature = metadata.temperature[:rows].float()
        temperature = torch.where(temperature < 1e-5, 0.0, temperature)
    tokens, logprobs = coupled_sample(logits, seeds, positions, temperature)
    token_column = tokens.to(torch.int32)[:, None]
    ranks = torch.zeros(rows, dtype=torch.int64, device=logits.device)  # vLLM wants ranks; nobody here reads them
    return SamplerOutput(token_column, LogprobsTensors(token_column, logprobs[:, None], ranks))
