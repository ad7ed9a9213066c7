"""Requests: their keys, how prompts are dealt to engines, and responses that continue."""

from collections import deque
from dataclasses import replace

from rollout.types import Rollout, RolloutRequest, TokenSource

RequestKey = tuple[str, int, int]  # prompt id, sample index, epoch: a step may straddle two epochs


Backlog = dict[str, deque[list[RolloutRequest]]]  # precision -> the requests of one prompt, of the next one, ...


def key_of(item: RolloutRequest | Rollout) -> RequestKey:
    """What is stable about a response."""
    return item.prompt_id, item.sample_index, item.epoch


def deal(requests: list[RolloutRequest], precisions: list[str]) -> Backlog:
    """Requests by prompt, prompts in the order of their first request, dealt to the precisions of the engines in turn.

    Engines of one precision share what falls to it, as they have time: which of them is asked changes no token.
    """
    groups: dict[str, list[RolloutRequest]] = {}
    for request in requests:
        groups.setdefault(request.prompt_id, []).append(request)
    backlog: Backlog = {precision: deque() for precision in precisions}
    for place, group in enumerate(groups.values()):
        backlog[precisions[place % len(precisions)]].append(group)
    return backlog


def go_on(request: RolloutRequest, begun: Rollout) -> RolloutRequest:
    """What is left of a request whose response has begun elsewhere, or earlier.

    Of the sample's earlier response, what comes after the tokens that it has in common with the new one: none where it
    differs already.
    """
    past, length = request.past, len(begun.token_ids)
    if past is not None and all(source in (TokenSource.HISTORY, TokenSource.KEPT) for source in begun.sources):
        past = replace(past, token_ids=past.token_ids[length:], logprobs=past.logprobs[length:])
    else:
        past = None
    return replace(request, begun=begun.token_ids, past=past)


def join(begun: Rollout, rest: Rollout) -> Rollout:
    """A response of which the beginning was sampled elsewhere, or earlier, than the rest."""
    return replace(
        rest,
        token_ids=begun.token_ids + rest.token_ids,
        logprobs=begun.logprobs + rest.logprobs,
        sources=begun.sources + rest.sources,
        precisions=begun.precisions + rest.precisions,
        versions=begun.versions + rest.versions,
    )
