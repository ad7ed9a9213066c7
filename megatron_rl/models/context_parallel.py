"""Context parallelism: how the tokens of a packed row are dealt to ranks, and how what they hold is put together.

Each sequence is cut into 2 * cp_size equal chunks, of which rank r holds chunks r and 2 * cp_size - 1 - r, so that
causal attention costs every rank the same (Llama 3, arXiv 2407.21783, section 3.3.2; Transformer Engine and
megatron-core's rotary positions expect the same order).
"""

from typing import Any

import torch
from jaxtyping import Float, Int


def held_places(lengths: list[int], rank: int, size: int) -> Int[torch.Tensor, "held"]:
    """Places in a packed row that a rank holds, in its own order, int64 [sum(lengths) / size].

    Args:
        lengths: of the sequences in the row, each a multiple of 2 * `size`.
        rank, size: of the context-parallel group.
    """
    positions, start = [], 0
    for length in lengths:
        chunk = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            positions.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
        start += length
    return torch.cat(positions)


def join(
    part: Float[torch.Tensor, "held *rest"],
    positions: Int[torch.Tensor, "held"],
    total: int,
    group: torch.distributed.ProcessGroup,
    sum_gradients: bool,
) -> Float[torch.Tensor, "total *rest"]:
    """What all ranks of `group` hold, in one tensor on each of them.

    Args:
        part: this rank's rows.
        positions: where they belong; over all ranks, every place once.
        total: rows in all.
        group: the context-parallel group.
        sum_gradients: the ranks compute different things from the result, so that a row's gradient is the sum of
            theirs; otherwise all compute the same, and each already has the gradient of its rows.
    """
    joined: torch.Tensor = _Join.apply(part, positions, total, group, sum_gradients)
    return joined


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        part: torch.Tensor,
        positions: torch.Tensor,
        total: int,
        group: torch.distributed.ProcessGroup,
        sum_gradients: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(positions)
        ctx.group, ctx.sum_gradients = group, sum_gradients
        joined = part.new_zeros(total, *part.shape[1:]).index_copy_(0, positions, part)
        torch.distributed.all_reduce(joined, group=group)
        return joined

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (positions,) = ctx.saved_tensors
        (gradient,) = gradients
        if ctx.sum_gradients:
            gradient = gradient.clone()
            torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient.index_select(0, positions), None, None, None, None
