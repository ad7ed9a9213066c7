"""A batch of sequences, and its micro-batches.

Layout: per-token values exist for *response* tokens only and are flat, `[tokens]`: the responses of all sequences of
the batch one after the other. `Batch.offsets[i]` is where sequence i begins.
"""

import dataclasses
import itertools
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int

from megatron_rl.models.attention import PackedSequences
from megatron_rl.models.context_parallel import held_places
from rollout.types import Rollout, TokenSource


@dataclass
class Batch:
    """Sequences to score or train on, the same on every rank. All tensors are on the CPU."""

    prompts: list[list[int]]
    responses: list[list[int]]
    values: dict[str, Float[torch.Tensor, "tokens"]] = field(default_factory=dict)
    """Per-token values: rollout_logprobs, reused (1 for tokens of an earlier response that the lenient rule kept, else
    0), old_logprobs, ref_logprobs, values (a critic's), advantages, returns, importance, weights."""

    @classmethod
    def from_rollouts(cls, rollouts: list[Rollout]) -> "Batch":
        """The batch of `rollouts`, with their `rollout_logprobs` and `reused`."""
        reused = torch.tensor(
            [source == TokenSource.KEPT for rollout in rollouts for source in rollout.sources], dtype=torch.float32
        )
        logprobs = torch.tensor([value for rollout in rollouts for value in rollout.logprobs], dtype=torch.float32)
        return cls(
            [rollout.prompt_ids for rollout in rollouts],
            [rollout.token_ids for rollout in rollouts],
            {"rollout_logprobs": logprobs, "reused": reused},
        )

    @property
    def lengths(self) -> Int[torch.Tensor, "batch"]:
        """Response lengths, int64 [batch]."""
        return torch.tensor([len(response) for response in self.responses])

    @cached_property
    def offsets(self) -> list[int]:
        """Where each response begins in the flat layout, [batch + 1]."""
        return list(itertools.accumulate(map(len, self.responses), initial=0))

    @property
    def tokens(self) -> int:
        """Response tokens in the batch."""
        return self.offsets[-1]

    @property
    def sequence_tokens(self) -> int:
        """Tokens of all prompts and responses."""
        return sum(map(len, self.prompts)) + self.tokens

    def sequence_length(self, index: int) -> int:
        """Tokens of prompt and response together."""
        return len(self.prompts[index]) + len(self.responses[index])

    def select(self, start: int, stop: int) -> "Batch":
        """The sequences `start` to `stop` as a batch of their own."""
        tokens = slice(self.offsets[start], self.offsets[stop])
        values = {name: value[tokens] for name, value in self.values.items()}
        return Batch(self.prompts[start:stop], self.responses[start:stop], values)


def plan_microbatches(
    lengths: list[int], token_budget: int, ranks: int, equally_many: bool = False
) -> list[list[list[int]]]:
    """Split sequences over data-parallel ranks and pack each rank's share into micro-batches.

    Sequences are sorted by length, so that those packed together are alike; ranks get equal token sums as nearly as
    dealing the longest first allows.

    Args:
        lengths: tokens of each sequence.
        token_budget: most tokens of one micro-batch (a longer sequence is alone in its own).
        ranks: number of data-parallel ranks.
        equally_many: give every rank as many micro-batches, empty ones among them, as their passes need that meet in
            all-to-alls of experts.

    Returns:
        per rank, per micro-batch, the indices of its sequences. Every rank has at least one micro-batch, possibly
        empty.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += lengths[index]
    packed = [_pack(share, lengths, token_budget) for share in shares]
    most = max(map(len, packed)) if equally_many else 0
    return [rows + [[]] * (most - len(rows)) for rows in packed]


def _pack(share: list[int], lengths: list[int], token_budget: int) -> list[list[int]]:
    rows: list[list[int]] = [[]]
    used = 0
    for index in share:
        if rows[-1] and used + lengths[index] > token_budget:
            rows.append([])
            used = 0
        rows[-1].append(index)
        used += lengths[index]
    return rows


@dataclass
class Microbatch:
    """One packed row, or a context-parallel rank's part of it, on the device."""

    input_ids: Int[torch.Tensor, "one packed"]
    packing: PackedSequences
    rows: Int[torch.Tensor, "own"]
    """Positions in the (part of the) packed row whose logits predict a response token."""
    targets: Int[torch.Tensor, "own"]
    """The response tokens that they predict."""
    own: Int[torch.Tensor, "own"] | None
    """Which of the row's response tokens these are; None: all."""
    flat_index: Int[torch.Tensor, "tokens"]
    """Positions of all its response tokens in the batch's flat layout (on the CPU)."""
    values: dict[str, Float[torch.Tensor, "tokens"]]
    """The batch's per-token values at `flat_index`, on the device."""
    sequences: list[int]
    """Which sequences of the batch are in the row, in their order there."""


def build_microbatch(
    batch: Batch, indices: list[int], multiple: int, device: torch.device, part: tuple[int, int] = (0, 1)
) -> Microbatch:
    """Pack the sequences `indices` of `batch` into one row.

    An empty list gives a row of padding, which keeps all ranks of a pipeline in step.

    Args:
        batch: where the sequences are.
        indices: which ones.
        multiple: the length of the row, or of each rank's part of it, is a multiple of this.
        device: for the tensors.
        part: rank and size of the context-parallel group; see `models/context_parallel.py`.
    """
    rank, size = part
    unit = 2 * size if size > 1 else 1
    input_ids: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    flat_index: list[int] = []
    lengths: list[int] = []
    for index in indices:
        prompt, response = batch.prompts[index], batch.responses[index]
        first = len(input_ids) + len(prompt) - 1
        rows += range(first, first + len(response))
        targets += response
        flat_index += range(batch.offsets[index], batch.offsets[index + 1])
        padding = -(len(prompt) + len(response)) % unit
        input_ids += prompt + response + [0] * padding
        lengths.append(len(prompt) + len(response) + padding)
    padding = -len(input_ids) % (multiple * unit) if input_ids else multiple * unit
    if padding:
        input_ids += [0] * padding
        lengths.append(padding)
    positions = torch.tensor(flat_index, dtype=torch.int64)
    tokens, predicting, predicted = (torch.tensor(ids, dtype=torch.int64) for ids in (input_ids, rows, targets))
    held = own = None
    if size > 1:
        held = held_places(lengths, rank, size)
        position_here = torch.full((len(tokens),), -1).index_copy(0, held, torch.arange(len(held)))
        own = (position_here[predicting] >= 0).nonzero()[:, 0]
        tokens, predicting, predicted = tokens[held], position_here[predicting[own]], predicted[own]
    return Microbatch(
        input_ids=tokens.to(device)[None],
        packing=PackedSequences.from_lengths(lengths, device, held),
        rows=predicting.to(device),
        targets=predicted.to(device),
        own=None if own is None else own.to(device),
        flat_index=positions,
        values={name: value[positions].to(device) for name, value in batch.values.items()},
        sequences=indices,
    )


def with_values(batch: Batch, **values: torch.Tensor) -> Batch:
    """`batch` with more per-token values."""
    return dataclasses.replace(batch, values=batch.values | values)
