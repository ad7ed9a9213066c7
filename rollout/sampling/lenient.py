"""The lenient rule in the engine: an earlier response is kept up to the first token that the rule rejects.

SPEC-RL (arXiv 2509.23232) keeps a token with probability `min(1, e^lenience * p_now / p_then)`. Both probabilities are
the engine's here, and the operator of `rollout.sampling.verify` decides. The row after the drafts (also that of the
first token, after the prompt) needs care: plain verification would sample there, and lose the rest of the earlier
response. So it is verified in a second call, as a row with a draft.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rollout.sampling.verify import Verified, verify_tokens


@dataclass(frozen=True)
class LenientDraft:
    """What the lenient rule has to decide in a step, for one request."""

    lenience: float
    logprobs: list[float]
    """Of its draft tokens, when they were generated."""
    next_token: int | None
    """The token of the earlier response after the drafts; None: it ends there."""
    next_logprob: float
    """Of that token, when it was generated."""


def verify_leniently(
    lenient: Sequence[LenientDraft | None],
    logits: Float[Tensor, "rows vocab"],
    cu_rows: Int[Tensor, "batch+1"],
    draft_ids: Int[Tensor, "drafts"],
    temperature: Float[Tensor, "batch"],
    seeds: Int[Tensor, "batch"],
    positions: Int[Tensor, "batch"],
    max_rows: int,
    counts: Sequence[int],
) -> tuple[Verified, Int[Tensor, "batch max_rows"]]:
    """`verify_tokens` where some requests keep an earlier response.

    Args:
        lenient: one per request; None: its drafts are verified by the coupled rule.
        logits, cu_rows, draft_ids, temperature, seeds, positions, max_rows: see `verify_tokens`.
        counts: draft tokens of each request.

    Returns:
        What was emitted, and int64 marks: 1 where the token after all drafts was kept too.
    """
    device = logits.device
    logprobs_then = [
        value
        for draft, count in zip(lenient, counts, strict=True)
        for value in (draft.logprobs if draft else [0.0] * count)
    ]
    lenience = torch.tensor([draft.lenience if draft else torch.nan for draft in lenient], device=device)
    done = verify_tokens(
        logits,
        cu_rows,
        draft_ids,
        temperature,
        seeds,
        positions,
        max_rows,
        torch.tensor(logprobs_then, dtype=torch.float32, device=device),
        lenience,
    )
    marks = torch.zeros(done.tokens.shape, dtype=torch.int64, device=device)
    continued = [i for i, draft in enumerate(lenient) if draft is not None and draft.next_token is not None]
    if not continued:
        return done, marks
    requests = torch.tensor(continued, device=device)
    drafts = torch.tensor([counts[i] for i in continued], device=device)
    ends = _verify_next_tokens(
        [draft for draft in lenient if draft is not None and draft.next_token is not None],
        logits[cu_rows[1:].long()[requests] - 1],
        temperature[requests],
        seeds[requests],
        positions[requests] + drafts,
        lenience[requests],
    )
    reached = done.num_emitted[requests] == drafts + 1
    for values, next_values in (
        (done.tokens, ends.tokens[:, 0]),
        (done.logprobs, ends.logprobs[:, 0]),
        (marks, (ends.num_emitted == 2).long()),
    ):
        values[requests, drafts] = torch.where(reached, next_values, values[requests, drafts])
    return done, marks


def _verify_next_tokens(
    lenient: Sequence[LenientDraft],
    logits: Float[Tensor, "batch vocab"],
    temperature: Float[Tensor, "batch"],
    seeds: Int[Tensor, "batch"],
    positions: Int[Tensor, "batch"],
    lenience: Float[Tensor, "batch"],
) -> Verified:
    """Verify each request's next token as a draft of one, in the last row of the request."""
    device = logits.device
    return verify_tokens(
        # An operator call needs a row after the draft's; what it emits there is not used.
        logits.repeat_interleave(2, dim=0),
        torch.arange(0, 2 * len(lenient) + 1, 2, dtype=torch.int32, device=device),
        torch.tensor([draft.next_token for draft in lenient], dtype=torch.int32, device=device),
        temperature,
        seeds,
        positions,
        2,
        torch.tensor([draft.next_logprob for draft in lenient], dtype=torch.float32, device=device),
        lenience,
    )
