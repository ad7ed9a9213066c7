"""The reduced vocabulary of a drafter: the tokens that rollouts use most (FR-Spec, arXiv 2502.14856; EAGLE-3)."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class DraftVocabulary:
    """Which tokens of the policy's vocabulary a head can propose."""

    token_ids: Int[Tensor, "draft_vocab"]
    """int64, ascending: the policy's id of each draft id."""
    vocab_size: int
    """Size of the policy's vocabulary."""

    @property
    def d2t(self) -> Int[Tensor, "draft_vocab"]:
        """int64 offsets, as EAGLE-3 checkpoints store them: draft id + d2t[draft id] = the policy's id."""
        return self.token_ids - torch.arange(len(self.token_ids), device=self.token_ids.device)

    @property
    def t2d(self) -> Bool[Tensor, "vocab"]:
        """For each token of the policy, whether the head can propose it (not its draft id), as checkpoints store it."""
        kept = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.token_ids.device)
        kept[self.token_ids] = True
        return kept


def choose_vocabulary(
    token_counts: Int[Tensor, "vocab"], draft_vocab_size: int, always: Iterable[int] = ()
) -> DraftVocabulary:
    """Take the most frequent tokens; of equally frequent ones those with the lowest ids.

    Args:
        token_counts: how often each token of the policy's vocabulary occurs in responses.
        draft_vocab_size: number of tokens to take.
        always: ids to take whatever their counts are: the end of sequence and other special tokens.

    Raises:
        ValueError: `draft_vocab_size` or the number of special tokens is too large, or an id of `always` is outside the
            vocabulary.
    """
    vocab_size = len(token_counts)
    special = sorted(set(always))
    if not 0 < draft_vocab_size <= vocab_size:
        raise ValueError(f"The draft vocabulary has {draft_vocab_size} tokens; choose 1 to {vocab_size}.")
    if len(special) > draft_vocab_size:
        raise ValueError(f"{len(special)} special tokens do not fit into a draft vocabulary of {draft_vocab_size}.")
    if outside := [token for token in special if not 0 <= token < vocab_size]:
        raise ValueError(f"Token {outside[0]} is to be kept, but the vocabulary has only {vocab_size} tokens.")
    order = torch.sort(token_counts, descending=True, stable=True).indices
    first = torch.tensor(special, dtype=torch.int64, device=order.device)
    order = torch.cat([first, order[~torch.isin(order, first)]])
    return DraftVocabulary(order[:draft_vocab_size].sort().values, vocab_size)
