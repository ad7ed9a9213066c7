"""The lenient rule in the engine: earlier responses are kept up to the first token that it rejects.

SPEC-RL (arXiv 2509.23232) keeps a token with probability `min(1, e^lenience * p_now / p_then)`. Both are the engine's
here, and the operator of `rollout.sampling.verify` decides. What is special is the row after the drafts, also that of
the first token, after the prompt: plain verification would sample there, and lose the rest of the earlier response with
it. It is verified in a second call, as a row with a draft.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from rollout.sampling.verify import Verified, verify_tokens


@dataclass(frozen=True)
class Judged:
    """What the scheduler asks to be judged in a step, for one request."""

    lenience: float
    logprobs: list[float]  # of its drafts, when they were generated
    next_token: int | None  # what the earlier response has after the drafts; None: it ends there
    next_logprob: float


def verify_leniently(
    judged: Sequence[Judged | None],
    logits: Tensor,
    cu_rows: Int[Tensor, " batch+1"],
    draft_ids: Int[Tensor, " drafts"],
    temperature: Tensor,
    seeds: Int[Tensor, " batch"],
    positions: Int[Tensor, " batch"],
    max_rows: int,
    counts: Sequence[int],
) -> tuple[Verified, Int[Tensor, "batch max_rows"]]:
    """`verify_tokens` where some requests keep an earlier response.

    Args:
        judged: one per request; None: its drafts are verified by the coupled rule.
        logits, cu_rows, draft_ids, temperature, seeds, positions, max_rows: see `verify_tokens`.
        counts: draft tokens of each request.

    Returns:
        What was emitted, and int64 marks: 1 where the token after all drafts was kept too.
    """
    device = logits.device
    thens = [
        value
        for each, count in zip(judged, counts, strict=True)
        for value in (each.logprobs if each else [0.0] * count)
    ]
    lenience = torch.tensor([each.lenience if each else torch.nan for each in judged], device=device)
    done = verify_tokens(
        logits,
        cu_rows,
        draft_ids,
        temperature,
        seeds,
        positions,
        max_rows,
        torch.tensor(thens, dtype=torch.float32, device=device),
        lenience,
    )
    marks = torch.zeros(done.tokens.shape, dtype=torch.int64, device=device)
    asking = [(place, each) for place, each in enumerate(judged) if each is not None and each.next_token is not None]
    if not asking:
        return done, marks
    requests = torch.tensor([place for place, _ in asking], device=device)
    drafts = torch.tensor([counts[place] for place, _ in asking], device=device)
    rows = cu_rows[1:].long()[requests] - 1
    ends = verify_tokens(
        logits[rows.repeat_interleave(2)],  # the second row is there for its number: what it emits is not used
        torch.arange(0, 2 * len(asking) + 1, 2, dtype=torch.int32, device=device),
        torch.tensor([each.next_token for _, each in asking], dtype=torch.int32, device=device),
        temperature[requests],
        seeds[requests],
        positions[requests] + drafts,
        2,
        torch.tensor([each.next_logprob for _, each in asking], dtype=torch.float32, device=device),
        lenience[requests],
    )
    reached = done.num_emitted[requests] == drafts + 1
    for mine, theirs in (
        (done.tokens, ends.tokens[:, 0]),
        (done.logprobs, ends.logprobs[:, 0]),
        (marks, (ends.num_emitted == 2).long()),
    ):
        mine[requests, drafts] = torch.where(reached, theirs, mine[requests, drafts])
    return done, marks
