"""Requests: their keys, how prompts are dealt to engines, and responses that continue."""

from collections import deque
from dataclasses import replace

from rollout.types import Rollout, RolloutRequest, TokenSource

RequestKey = tuple[str, int, int]
"""Prompt id, sample index, epoch: a step may straddle two epochs."""
Backlog = dict[str, deque[list[RolloutRequest]]]
"""Precision -> pending requests, a list per prompt."""


def key_of(item: RolloutRequest | Rollout) -> RequestKey:
    """What identifies a response, whichever engine generates it."""
    return item.prompt_id, item.sample_index, item.epoch


def deal(requests: list[RolloutRequest], precisions: list[str]) -> Backlog:
    """Group requests by prompt, and deal the prompts to the precisions in turn, in the order of their first request.

    Engines of one precision share their prompts, as they have time: which of them generates a prompt changes no token.
    """
    groups: dict[str, list[RolloutRequest]] = {}
    for request in requests:
        groups.setdefault(request.prompt_id, []).append(request)
    backlog: Backlog = {precision: deque() for precision in precisions}
    for index, group in enumerate(groups.values()):
        backlog[precisions[index % len(precisions)]].append(group)
    return backlog


def continue_from(request: RolloutRequest, partial: Rollout) -> RolloutRequest:
    """What is left of a request whose response was begun elsewhere, or earlier.

    Of the sample's earlier response it keeps what comes after the tokens that both responses share; nothing if they
    differ already.

    Args:
        request: the whole response.
        partial: its tokens so far.
    """
    past, length = request.past, len(partial.token_ids)
    if past is not None and all(source in (TokenSource.HISTORY, TokenSource.KEPT) for source in partial.sources):
        past = replace(past, token_ids=past.token_ids[length:], logprobs=past.logprobs[length:])
    else:
        past = None
    return replace(request, partial_ids=partial.token_ids, past=past)


def join_rollouts(partial: Rollout, rest: Rollout) -> Rollout:
    """A response whose beginning was sampled elsewhere, or earlier, than the rest."""
    return replace(
        rest,
        token_ids=partial.token_ids + rest.token_ids,
        logprobs=partial.logprobs + rest.logprobs,
        sources=partial.sources + rest.sources,
        precisions=partial.precisions + rest.precisions,
        versions=partial.versions + rest.versions,
    )
