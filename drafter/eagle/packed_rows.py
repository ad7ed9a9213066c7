"""Training data of the head: rows of packed sequences with the policy's hidden states, and which drafts in them count.

Terms used in this package. A row holds several sequences, one after the other, and perhaps padding at its end. A draft
starts at an *anchor*, position p: the policy's features up to p and the token p + 1, just sampled, are known. Step i
(from 0) of the draft reads token p + 1 + i and proposes token p + 2 + i, which the policy itself predicts from its
hidden state at p + 1 + i, the *target position* of that step.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class PackedFeatures:
    """One row of packed sequences; all tensors on one device. Padding is finite numbers behind the last sequence."""

    token_ids: Int[Tensor, "seq"]
    """int64."""
    hidden_states: Float[Tensor, "seq features"]
    """What the head reads. EAGLE-3: the policy's residual stream at `HeadConfig.aux_layers`, concatenated; EAGLE:
    `final_hidden`."""
    final_hidden: Float[Tensor, "seq hidden"]
    """The policy's last hidden state, after its final norm: times the policy's head it gives the logits of the next
    token."""
    response_mask: Bool[Tensor, "seq"]
    """True where the token was sampled by the policy."""
    cu_seqlens: Int[Tensor, "sequences+1"]
    """First position of each sequence, and the end of the last."""

    def to(self, device: torch.device) -> "PackedFeatures":
        """The row on another device."""
        return PackedFeatures(**{name: value.to(device) for name, value in vars(self).items()})


def pack(rows: list[PackedFeatures]) -> PackedFeatures:
    """The sequences of several rows as one, new tensors; the rows have no padding."""
    cu_seqlens, length = rows[0].cu_seqlens[:1], 0
    for row in rows:
        cu_seqlens = torch.cat([cu_seqlens, row.cu_seqlens[1:] + length])
        length += len(row.token_ids)
    final = torch.cat([row.final_hidden for row in rows])
    shared = all(row.hidden_states is row.final_hidden for row in rows)
    return PackedFeatures(
        token_ids=torch.cat([row.token_ids for row in rows]),
        hidden_states=final if shared else torch.cat([row.hidden_states for row in rows]),
        final_hidden=final,
        response_mask=torch.cat([row.response_mask for row in rows]),
        cu_seqlens=cu_seqlens,
    )


@dataclass(frozen=True)
class FrozenPolicy:
    """The tensors of the policy that a head computes with. They are frozen: no gradient reaches them."""

    embedding: Float[Tensor, "vocab hidden"]
    lm_head: Float[Tensor, "sampled_vocab hidden"]
    """Of the tokens that engines sample: they mask those past the tokenizer, for which a padded vocabulary has rows.
    The memory of `embedding` where the policy ties them."""


def sequence_numbers(cu_seqlens: Int[Tensor, "sequences+1"], length: int) -> Int[Tensor, "seq"]:
    """The number of the sequence that each of `length` positions belongs to; padding has the number of sequences."""
    return torch.searchsorted(cu_seqlens[1:], torch.arange(length, device=cu_seqlens.device), right=True)


def counted_drafts(
    response_mask: Bool[Tensor, "seq"], cu_seqlens: Int[Tensor, "sequences+1"], steps: int
) -> Bool[Tensor, "steps seq"]:
    """Which steps of which anchors count: [i, p] is True where step i of anchor p is one that an engine would verify.

    The engine drafts after it sampled a token, so token p + 1 has to be a response token, and so has every token up to
    p + 2 + i, the proposed one, in the same sequence. Nothing crosses into the next sequence or into padding.

    Args:
        response_mask: True where the token was sampled by the policy.
        cu_seqlens: first position of each sequence, and the end of the last.
        steps: draft tokens per anchor.
    """
    length = len(response_mask)
    number = sequence_numbers(cu_seqlens, length)
    positions = torch.arange(length, device=response_mask.device)

    def sampled(ahead: int) -> Tensor:
        there = (positions + ahead).clamp(max=length - 1)
        same_sequence = (positions + ahead < length) & (number[there] == number) & (number < len(cu_seqlens) - 1)
        return same_sequence & response_mask[there]

    counted = sampled(1)
    rows = []
    for step in range(steps):
        counted = counted & sampled(2 + step)
        rows.append(counted)
    return torch.stack(rows)


def to_target_positions(by_anchor: Tensor) -> Tensor:
    """[steps, seq, ...] indexed by anchor -> the same indexed by target position: [i, p] moves to [i, p + 1 + i].

    Values that leave the row wrap around to its other end; such steps never count.
    """
    return torch.stack([values.roll(1 + step, dims=0) for step, values in enumerate(by_anchor)])


def to_anchors(by_target: Tensor) -> Tensor:
    """The inverse of `to_target_positions`."""
    return torch.stack([values.roll(-1 - step, dims=0) for step, values in enumerate(by_target)])
