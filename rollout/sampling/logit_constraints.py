"""What a request's options do to its logits before a token is sampled: masks, penalties, truncation.

vLLM applies these to one row per request in its sampler, and with other code in its rejection sampler. Here all rows
are treated alike: the past of a row is the request's output and the drafts before the row.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.bad_words import apply_bad_words_with_drafts
from vllm.v1.sample.ops.penalties import apply_all_penalties
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

SUPPORTED = (
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "bad_words",
    "min_tokens",
    "logit_bias",
    "allowed_token_ids",
)
"""Options of vLLM's SamplingParams that coupled sampling honours, beside temperature and the stop conditions."""


@dataclass(frozen=True)
class RequestOptions:
    """A request's options, and how many tokens it has generated."""

    parameters: SamplingParams
    generated: int
    """Tokens."""

    @property
    def constrains(self) -> bool:
        """Whether there is an option that vLLM's metadata does not contain, or not for draft rows."""
        parameters = self.parameters
        return parameters.min_p > 0 or bool(parameters.logit_bias) or self.generated < parameters.min_tokens


@dataclass(frozen=True)
class BatchRows:
    """The rows of a batch: request i owns `1 + len(drafts[i])` consecutive ones."""

    drafts: list[list[int]]
    owner: Int[Tensor, "rows"]
    """int64: the request of each row."""

    @classmethod
    def of(cls, drafts: list[list[int]], device: torch.device) -> "BatchRows":
        """The rows of requests with these drafts."""
        counts = torch.tensor([len(draft) + 1 for draft in drafts], device=device)
        return cls(drafts, torch.repeat_interleave(counts))

    def outputs(self, committed: list[list[int]]) -> list[list[int]]:
        """Per row, what the request has generated before it."""
        return [
            [*output, *draft[:position]]
            for output, draft in zip(committed, self.drafts, strict=True)
            for position in range(len(draft) + 1)
        ]


def needs_constraints(metadata: SamplingMetadata, options: list[RequestOptions]) -> bool:
    """Whether any request of the batch needs `constrain`."""
    return (
        metadata.top_k is not None
        or metadata.top_p is not None
        or not metadata.no_penalties
        or metadata.allowed_token_ids_mask is not None
        or bool(metadata.bad_words_token_ids)
        or any(request.constrains for request in options)
    )


def refuse_unsupported(metadata: SamplingMetadata) -> None:
    """Check a batch for what coupled sampling lacks.

    Raises:
        ValueError: a request has an option that is not supported; the message names it.
    """
    processors = metadata.logitsprocs.argmax_invariant + metadata.logitsprocs.non_argmax_invariant
    known = (MinPLogitsProcessor, MinTokensLogitsProcessor, LogitBiasLogitsProcessor)
    holder = metadata.thinking_budget_state_holder
    present = {
        f"the logits processor {type(processor).__name__}": not isinstance(processor, known) for processor in processors
    } | {
        "more than the sampled token's log-probability": (metadata.max_num_logprobs or 0) > 0,
        "logprob_token_ids": bool(metadata.logprob_token_ids),
        "a thinking budget": holder is not None and holder.has_tracked_requests(),
    }
    if unsupported := [name for name, is_present in present.items() if is_present]:
        raise ValueError(
            f"Coupled sampling does not support {'; '.join(unsupported)}: "
            "leave it out, or send the request without a seed."
        )


def constrain(
    logits: Float[Tensor, "rows vocab"],
    metadata: SamplingMetadata,
    options: list[RequestOptions],
    rows: BatchRows,
    vocab_limit: int | None,
) -> Float[Tensor, "rows vocab"]:
    """Apply the options to the logits.

    The order is vLLM's: allowed ids, bad words, bias, minimum length, penalties, temperature, min-p, top-k, top-p.
    Before all of them the ids from `vocab_limit` on are excluded, or they could be among the top k.

    Args:
        logits: any float dtype; not changed.
        metadata: vLLM's, of the batch.
        options: one per request.
        rows: which rows belong to which request.
        vocab_limit: token ids from this one on are excluded; None: none are.

    Returns:
        New float32 logits, divided by the temperature where it is not 0, with excluded tokens at -inf.
    """
    logits = logits.to(torch.float32, copy=True)
    if vocab_limit is not None:
        logits[:, vocab_limit:] = -torch.inf
    owner = rows.owner
    needs_past = bool(metadata.bad_words_token_ids) or not metadata.no_penalties
    past = rows.outputs(metadata.output_token_ids) if needs_past else []
    if metadata.allowed_token_ids_mask is not None:
        logits.masked_fill_(metadata.allowed_token_ids_mask[owner], -torch.inf)
    if metadata.bad_words_token_ids:
        apply_bad_words_with_drafts(
            logits, metadata.bad_words_token_ids, past, [len(draft) + 1 for draft in rows.drafts]
        )
    _apply_bias_and_minimum(logits, options, rows)
    if not metadata.no_penalties:
        assert metadata.prompt_token_ids is not None
        penalties = (metadata.presence_penalties, metadata.frequency_penalties, metadata.repetition_penalties)
        prompts, *repeated = (tensor[owner] for tensor in (metadata.prompt_token_ids, *penalties))
        logits = apply_all_penalties(logits, prompts, *repeated, past)
    if metadata.temperature is None:  # all greedy: what follows does not change the largest
        return logits
    temperature = metadata.temperature[owner]
    logits.div_(torch.where(is_greedy(temperature), 1.0, temperature)[:, None])
    if any(request.parameters.min_p for request in options):
        floor = torch.tensor([request.parameters.min_p for request in options], device=logits.device)[owner].log()
        logits.masked_fill_(logits < logits.amax(dim=-1, keepdim=True) + floor[:, None], -torch.inf)
    top_k = None if metadata.top_k is None else metadata.top_k[owner]
    top_p = None if metadata.top_p is None else metadata.top_p[owner]
    return apply_top_k_top_p(logits, top_k, top_p)


def is_greedy(temperature: Tensor) -> Tensor:
    """vLLM treats temperatures below 1e-5 as greedy."""
    return temperature < 1e-5


def _apply_bias_and_minimum(
    logits: Float[Tensor, "rows vocab"], options: list[RequestOptions], rows: BatchRows
) -> None:
    begin = 0
    for request, draft in zip(options, rows.drafts, strict=True):
        end = begin + len(draft) + 1
        if bias := request.parameters.logit_bias:
            ids = torch.tensor(list(bias), device=logits.device)
            logits[begin:end, ids] += torch.tensor(list(bias.values()), device=logits.device)
        short = min(begin + max(request.parameters.min_tokens - request.generated, 0), end)
        if short > begin:
            ids = torch.tensor(sorted(request.parameters.all_stop_token_ids), dtype=torch.int64, device=logits.device)
            logits[begin:short, ids] = -torch.inf
        begin = end
