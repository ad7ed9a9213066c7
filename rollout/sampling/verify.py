"""Drafts in, verified tokens out: the native operator `megatron_rl::verify_tokens`, and its PyTorch reference.

Token t of a request is `argmax_v(logits_t[v] / T + g(seed, t, v))` with counter-based Gumbel noise g (the Gumbel-max
trick, so an exact sample of the softmax). A draft is verified by computing that sample at the draft's rows: samples are
emitted as long as they equal the draft; the first that differs is emitted too, and ends the request. So plain decoding
is the verification of an empty draft, and drafts change the speed but not the tokens. Two samplers that share g agree
without exchanging probabilities: "coupling without communication", arXiv 2408.07978.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rollout.native import load_operators
from rollout.sampling.gumbel_noise import GREEDY_BELOW, acceptance_uniforms, coupled_sample, scale


class Verified(NamedTuple):
    """What a verification emits."""

    tokens: Int[Tensor, "batch max_rows"]
    """int32; -1 after a request's last token."""
    num_emitted: Int[Tensor, "batch"]
    """int32: tokens of each request, 1 .. k + 1. On CUDA a negative number reports an error in the data."""
    logprobs: Float[Tensor, "batch max_rows"]
    """float32: log-probability of each token under softmax(logits / T); 0 after the last."""


load_operators(Path(__file__).with_name("_verify.so"))


def verify_tokens(
    logits: Float[Tensor, "rows vocab"],
    cu_rows: Int[Tensor, "batch+1"],
    draft_ids: Int[Tensor, "drafts"],
    temperature: Float[Tensor, "batch"],
    seeds: Int[Tensor, "batch"],
    positions: Int[Tensor, "batch"],
    max_rows: int,
    draft_logprobs: Float[Tensor, "drafts"] | None = None,
    lenience: Float[Tensor, "batch"] | None = None,
) -> Verified:
    """Verify the drafts of a batch of requests, in one pass over their logits.

    A request with k draft tokens owns k + 1 consecutive rows of logits: one per draft and one for the token after.
    All tensors are on one device, and contiguous except for the row stride of `logits`.

    Args:
        logits: float32, bfloat16 or float16; excluded tokens at -inf. The row stride is free.
        cu_rows: int32, the first row of each request, and the number of rows at the end.
        draft_ids: int32, the drafts of all requests, one after the other.
        temperature: float32; below 1e-5 means greedy (the lowest id on ties, log-probabilities of softmax(logits)).
        seeds: int64.
        positions: int64, the position of each request's first row; the next rows count on. The low 32 bits are used.
        max_rows: columns of the output, at least the largest number of rows of a request.
        draft_logprobs: float32, the log-probability of each draft when it was drawn. Lenient rule only.
        lenience: float32, one per request. The draft of a row is accepted if
            `log u <= lenience + (logprob now - draft_logprob)`, u uniform and independent of the Gumbel noise; at the
            first rejection the row's coupled sample is emitted. Infinite: all, or nothing, is accepted, but never a
            token that is excluded now. NaN: the coupled rule for this request. Greedy requests accept the argmax alone.

    Returns:
        Tokens, their numbers and log-probabilities. On CPU they depend on a request's own rows alone, to the last bit:
        not on the batch or the number of threads. CUDA gives the same tokens.

    Raises:
        ValueError: names the argument with a wrong shape, dtype, device or layout; or, on CPU, with wrong data: NaN or
            +inf in a row that was read, a row with only -inf, a draft id outside the vocabulary, a negative or
            non-finite temperature, a draft log-probability that is NaN or +inf, row numbers that do not fit. On CUDA,
            where that would stall the stream, such a request has tokens -1 and a negative `num_emitted`: call
            `raise_for_status` once that has reached the host.
        ImportError: `logits` is on CUDA, and the CUDA library has not been built.
    """
    if logits.is_cuda:
        load_operators(Path(__file__).with_name("_verify_cuda.so"))
    arguments = logits, cu_rows, draft_ids, temperature, seeds, positions, max_rows, draft_logprobs, lenience
    return Verified(*torch.ops.megatron_rl.verify_tokens(*arguments))


def raise_for_status(num_emitted: Int[Tensor, "batch"]) -> None:
    """Report what `verify_tokens` could not report on CUDA.

    Raises:
        ValueError: as `verify_tokens` raises it on CPU, if the data of a request was wrong.
    """
    torch.ops.megatron_rl.raise_for_verify_status(num_emitted.cpu())


def verify_tokens_reference(
    logits: Float[Tensor, "rows vocab"],
    cu_rows: Int[Tensor, "batch+1"],
    draft_ids: Int[Tensor, "drafts"],
    temperature: Float[Tensor, "batch"],
    seeds: Int[Tensor, "batch"],
    positions: Int[Tensor, "batch"],
    max_rows: int,
    draft_logprobs: Float[Tensor, "drafts"] | None = None,
    lenience: Float[Tensor, "batch"] | None = None,
) -> Verified:
    """`verify_tokens` in plain PyTorch, without its checks: the reference that the operator is tested against."""
    batch = len(temperature)
    request_of = torch.arange(batch, device=logits.device).repeat_interleave(cu_rows.diff())
    position_of = positions[request_of] + torch.arange(len(logits), device=logits.device) - cu_rows[request_of]
    samples, logprobs = coupled_sample(logits, seeds[request_of], position_of, temperature[request_of])
    log_u = acceptance_uniforms(seeds[request_of], position_of).log()
    out = Verified(
        torch.full((batch, max_rows), -1, dtype=torch.int32, device=logits.device),
        torch.zeros(batch, dtype=torch.int32, device=logits.device),
        torch.zeros(batch, max_rows, device=logits.device),
    )
    for request in range(batch):
        lenient = lenience is not None and not lenience[request].isnan() and temperature[request] >= GREEDY_BELOW
        start, end = cu_rows[request : request + 2].tolist()
        for column, row in enumerate(range(start, end)):
            token, logprob, continues = int(samples[row]), logprobs[row], False
            if row + 1 < end:
                draft = int(draft_ids[row - request])
                continues = token == draft
                if lenient:
                    assert lenience is not None and draft_logprobs is not None
                    scaled = scale(logits[row, None], temperature[request, None])[0].double()
                    now = (scaled[draft] - scaled.logsumexp(0)).float()
                    bound = lenience[request].double() + (now.double() - draft_logprobs[row - request])
                    continues = bool(now > -torch.inf and log_u[row] <= bound)
                    token, logprob = (draft, now) if continues else (token, logprob)
            out.tokens[request, column] = token
            out.logprobs[request, column] = logprob
            out.num_emitted[request] += 1
            if not continues:
                break
    return out


@torch.library.register_fake("megatron_rl::verify_tokens")
def _shapes(
    logits: Tensor,
    cu_rows: Tensor,
    draft_ids: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    max_rows: int,
    draft_logprobs: Tensor | None = None,
    lenience: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = cu_rows.shape[0] - 1
    return (
        logits.new_empty((batch, max_rows), dtype=torch.int32),
        logits.new_empty((batch,), dtype=torch.int32),
        logits.new_empty((batch, max_rows), dtype=torch.float32),
    )
