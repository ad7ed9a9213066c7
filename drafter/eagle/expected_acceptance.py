"""How many draft tokens an engine would accept, computed from features alone, before a head is published.

Under coupled verification (see docs/architecture.md) drafter and policy sample with the same Gumbel noise, so a draft
token is accepted when `argmax(log q + g)` and `argmax(log p + g)` are the same token. Both pick x exactly if x wins
against every v in both races; with exponential clocks E = exp(-g) that is `E_v >= E_x max(p_v / p_x, q_v / q_x)` for
all v, so

    P(both pick x) = 1 / sum_v max(p_v / p_x, q_v / q_x)

(the Gumbel coupling of "Coupling without communication and drafter-invariant speculative decoding", arXiv 2408.07978).
Divided by p_x it is the probability that the draft token is accepted *given* that the policy sampled x:

    P(accepted | x) = 1 / sum_v max(p_v, q_v p_x / q_x)

A held-out response shows which x the policy sampled at every position, and the noise of different positions is
independent: the product of these probabilities along the response is the probability that a draft is accepted up to
there, without any simulation. Its mean over anchors is an unbiased estimate, given responses that the policy sampled
itself at that temperature.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from drafter.eagle.draft_loss import unroll
from drafter.eagle.head import EagleHead
from drafter.eagle.packed_rows import FrozenPolicy, PackedFeatures, counted_drafts, to_anchors, to_target_positions


@dataclass(frozen=True)
class ExpectedAcceptance:
    """Expected numbers over the anchors of some rows; add them up over rows with `+`."""

    reached: Float[Tensor, "steps"]
    """How many drafts are expected to have all tokens before step i accepted (of anchors where step i exists)."""
    accepted: Float[Tensor, "steps"]
    """How many of those are expected to have the token of step i accepted too."""

    def __add__(self, other: "ExpectedAcceptance") -> "ExpectedAcceptance":
        return ExpectedAcceptance(self.reached + other.reached, self.accepted + other.accepted)

    @property
    def per_position(self) -> Float[Tensor, "steps"]:
        """Probability that the token of step i is accepted, given that those before it were; 0 without observations."""
        return self.accepted / self.reached.clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def expected_length(self) -> float:
        """Tokens emitted per verification: `1 + sum_j prod_(i <= j) per_position[i]`, 1 to steps + 1.

        One more than the accepted drafts: the verifier always emits a token of its own, as vLLM's acceptance length
        counts it.
        """
        return 1 + float(self.per_position.cumprod(dim=0).sum())


@torch.no_grad()
def expected_acceptance(
    head: EagleHead,
    features: PackedFeatures,
    policy: FrozenPolicy,
    steps: int,
    temperature: float = 1.0,
    rows_at_once: int = 256,
) -> ExpectedAcceptance:
    """What verification would accept of drafts of `steps` tokens from every position of a row's responses.

    Args:
        head: the drafter to evaluate.
        features: held-out responses, sampled by the policy (or nearly the policy) at `temperature`.
        policy: the weights that `features` were computed with.
        steps: draft tokens per verification, k.
        temperature: that of the engine, above 0. Policy and drafter are both divided by it.
        rows_at_once: positions whose logits exist at the same time.

    Raises:
        ValueError: `temperature` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} has to be positive: greedy decoding has no noise to share.")
    states = to_target_positions(unroll(head, features, policy, steps))
    sampled = features.token_ids.roll(-1)  # at the target position t the policy samples token t + 1
    proposed = head.proposed_ids(len(policy.lm_head))
    chances = [
        _chances(head, policy, proposed, states[:, rows], features.final_hidden[rows], sampled[rows], temperature)
        for start in range(0, len(sampled), rows_at_once)
        for rows in [slice(start, start + rows_at_once)]
    ]
    counted = counted_drafts(features.response_mask, features.cu_seqlens, steps)
    chance = torch.where(counted, to_anchors(torch.cat(chances, dim=1)), 0.0).double()
    survived = chance.cumprod(dim=0)
    before = torch.cat([torch.ones_like(survived[:1]), survived[:-1]])
    return ExpectedAcceptance(reached=torch.where(counted, before, 0.0).sum(dim=1), accepted=survived.sum(dim=1))


def _chances(
    head: EagleHead,
    policy: FrozenPolicy,
    proposed: Int[Tensor, "proposed"],
    states: Float[Tensor, "steps rows hidden"],
    final_hidden: Float[Tensor, "rows hidden"],
    sampled: Int[Tensor, "rows"],
    temperature: float,
) -> Float[Tensor, "steps rows"]:
    """For each step at each target position, the probability that it proposes the token that the policy sampled."""
    policy_logprobs = (F.linear(final_hidden, policy.lm_head).float() / temperature).log_softmax(dim=-1)
    draft_logits = head.logits(states, policy.lm_head)[..., : len(proposed)]
    draft_logprobs = (draft_logits.float() / temperature).log_softmax(dim=-1)
    return agreement(policy_logprobs, draft_logprobs, proposed, sampled)


def agreement(
    policy_logprobs: Float[Tensor, "rows vocab"],
    draft_logprobs: Float[Tensor, "steps rows draft_vocab"],
    token_ids: Int[Tensor, "draft_vocab"],
    sampled: Int[Tensor, "rows"],
) -> Float[Tensor, "steps rows"]:
    """`P(the draft is x | the policy samples x)` under shared Gumbel noise, x = `sampled`: the formula above.

    Args:
        policy_logprobs: over the tokens that engines sample.
        draft_logprobs: over the draft vocabulary.
        token_ids: the policy's id of each draft id, ascending.
        sampled: the policy's token of each row.

    Returns:
        Probabilities; 0 for a token that the drafter cannot propose, and for one that engines never sample (a prompt
        may hold such tokens).
    """
    known = sampled.clamp(max=policy_logprobs.shape[1] - 1)
    sampled_logprobs = policy_logprobs.gather(1, known[:, None])[:, 0]
    draft_ids = torch.searchsorted(token_ids, sampled).clamp(max=len(token_ids) - 1)
    possible = token_ids[draft_ids] == sampled
    index = draft_ids[None, :, None].expand(len(draft_logprobs), -1, 1)
    # max(p_v, q_v p_x / q_x) over the draft vocabulary; outside it q is 0, and what is left of p remains.
    scale = sampled_logprobs[None, :, None] - draft_logprobs.gather(2, index)
    shared = policy_logprobs[:, token_ids]
    total = torch.maximum(shared, draft_logprobs + scale).exp().sum(dim=-1)
    outside = (1 - shared.exp().sum(dim=-1)).clamp(min=0)
    return torch.where(possible, 1 / (total + outside), 0.0)
