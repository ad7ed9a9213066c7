"""Log-probabilities and entropy of given tokens from vocabulary-parallel logits.

Each rank of the tensor-parallel group holds a slice of the vocabulary; two small all-reduces per call combine the
slices, so the gathered [rows, vocab] never exists. Work goes chunk by chunk, which bounds the float32 temporaries.
"""

from typing import Any

import torch
from jaxtyping import Float, Int

CHUNK_ELEMENTS = 2**22  # float32 temporaries of 16 MiB


def token_logprobs(
    logits: Float[torch.Tensor, "rows vocab_shard"],
    tokens: Int[torch.Tensor, "rows"],
    temperature: float,
    vocab_limit: int,
    group: torch.distributed.ProcessGroup,
) -> tuple[Float[torch.Tensor, "rows"], Float[torch.Tensor, "rows"]]:
    """Log-probabilities of `tokens`, and entropies, under softmax(logits / temperature).

    Args:
        logits: this rank's slice of the vocabulary, float32 or bfloat16, [rows, vocab / tp_size].
        tokens: token ids of the whole vocabulary, int64 [rows].
        temperature: divides the logits.
        vocab_limit: token ids from here on (vocabulary padding, ids unknown to the tokenizer) are excluded, as they
            are when sampling.
        group: the tensor-parallel group.

    Returns:
        logprobs and entropies in nats, float32 [rows] each, equal on all ranks of the group; both differentiable.
    """
    logprobs, entropies = _TokenLogprobs.apply(logits, tokens, temperature, vocab_limit, group)
    return logprobs, entropies


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        temperature: float,
        vocab_limit: int,
        group: torch.distributed.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, width = logits.shape
        start = torch.distributed.get_rank(group) * width
        valid = min(max(vocab_limit - start, 0), width)
        maxima = logits.new_full((rows,), -torch.inf, dtype=torch.float32)
        for chunk in _chunks(rows, width):
            if valid:
                maxima[chunk] = logits[chunk, :valid].amax(-1).float() / temperature
        _reduce(maxima, torch.distributed.ReduceOp.MAX, group)
        # Per row: sum of exp, sum of exp * scaled logit, scaled logit of the token (0 where another rank holds it).
        sums = torch.zeros(3, rows, dtype=torch.float32, device=logits.device)
        local = tokens - start
        mine = (local >= 0) & (local < valid)
        for chunk in _chunks(rows, width):
            if not valid:
                break
            scaled = logits[chunk, :valid].float() / temperature
            weights = (scaled - maxima[chunk, None]).exp_()
            sums[0, chunk] = weights.sum(-1)
            sums[1, chunk] = (weights * scaled).sum(-1)
            picked = scaled.gather(1, local[chunk].clamp(0, valid - 1)[:, None])[:, 0]
            sums[2, chunk] = torch.where(mine[chunk], picked, torch.zeros_like(picked))
        _reduce(sums, torch.distributed.ReduceOp.SUM, group)
        normalizers = maxima + sums[0].log()
        entropies = normalizers - sums[1] / sums[0]
        ctx.save_for_backward(logits, local, mine, normalizers, entropies)
        ctx.temperature, ctx.valid = temperature, valid
        ctx.set_materialize_grads(False)
        return sums[2] - normalizers, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        logits, local, mine, normalizers, entropies = ctx.saved_tensors
        for_logprobs, for_entropies = gradients
        result = torch.zeros_like(logits)
        for chunk in _chunks(*logits.shape):
            if not ctx.valid:
                break
            scaled = logits[chunk, : ctx.valid].float() / ctx.temperature
            probabilities = (scaled - normalizers[chunk, None]).exp()
            gradient = torch.zeros_like(probabilities)
            if for_logprobs is not None:
                # d logprob / d scaled = onehot - p
                gradient -= for_logprobs[chunk, None] * probabilities
                hits = torch.where(mine[chunk], for_logprobs[chunk], torch.zeros_like(for_logprobs[chunk]))
                gradient.scatter_add_(1, local[chunk].clamp(0, ctx.valid - 1)[:, None], hits[:, None])
            if for_entropies is not None:
                # d entropy / d scaled = -p (log p + entropy)
                surprise = scaled - normalizers[chunk, None] + entropies[chunk, None]
                gradient -= for_entropies[chunk, None] * probabilities * surprise
            result[chunk, : ctx.valid] = (gradient / ctx.temperature).to(logits.dtype)
        return result, None, None, None, None


def _chunks(rows: int, width: int) -> list[slice]:
    step = max(CHUNK_ELEMENTS // max(width, 1), 1)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _reduce(tensor: torch.Tensor, operation: Any, group: torch.distributed.ProcessGroup) -> None:
    if tensor.numel() and torch.distributed.get_world_size(group) > 1:
        torch.distributed.all_reduce(tensor, operation, group)
