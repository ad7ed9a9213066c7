"""Log-probabilities and entropy of given tokens from vocabulary-parallel logits.

Each rank of the tensor-parallel group holds a slice of the vocabulary; two small all-reduces per call combine the
slices, so the gathered [rows, vocab] never exists.

What a rank computes from its slice are two torch operators. On the CPU they are native (csrc/logprobs.h): the logits
are read once forward, and once backward. Elsewhere they are the `*_in_torch` functions here, of the same signatures,
which the native ones are tested against; these work chunk by chunk, which bounds their float32 temporaries.

A logit of -inf is a token that cannot occur: it adds nothing to the entropy, its gradient is 0, and its own log-prob is
-inf. NaN or +inf anywhere in a row makes its log-prob, its entropy and its gradients NaN, as does a row of only -inf.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int

from rollout.native import load_operators

CHUNK_ELEMENTS = 2**22  # float32 temporaries of 16 MiB
# exp of it is the smallest normal float32. Where less is taken for it, 0 * -inf cannot make NaN.
LOWEST = -87.3365

load_operators(Path(__file__).with_name("_logprobs.so"))


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
        width = logits.shape[1]
        start = torch.distributed.get_rank(group) * width
        valid = min(max(vocab_limit - start, 0), width)
        local = tokens - start
        maxima, sums = torch.ops.megatron_rl.token_logprob_sums(logits, local, temperature, valid)
        own_maxima = maxima.clone()
        _reduce(maxima, torch.distributed.ReduceOp.MAX, group)
        sums = relative_to(maxima, own_maxima, sums)
        _reduce(sums, torch.distributed.ReduceOp.SUM, group)
        log_sums = sums[0].log()
        entropies = log_sums - sums[1] / sums[0]
        ctx.save_for_backward(logits, local, maxima + log_sums, entropies)
        ctx.temperature, ctx.valid = temperature, valid
        ctx.set_materialize_grads(False)
        return sums[2] - maxima - log_sums, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        upstream = [None if gradient is None else gradient.contiguous() for gradient in gradients]
        result = torch.ops.megatron_rl.token_logprob_gradient(*ctx.saved_tensors, *upstream, ctx.temperature, ctx.valid)
        return result, None, None, None, None


def relative_to(
    maxima: Float[torch.Tensor, "rows"],
    own_maxima: Float[torch.Tensor, "rows"],
    sums: Float[torch.Tensor, "3 rows"],
) -> Float[torch.Tensor, "3 rows"]:
    """The sums of a slice, relative to the maxima of the whole vocabulary instead of its own; float32."""
    # exp(-200) is 0: bounded, a slice of only -inf (or without valid columns) weighs nothing instead of 0 * inf.
    shifts = (own_maxima - maxima).clamp_min(-200)
    weights = shifts.exp()
    return torch.stack([sums[0] * weights, (sums[1] + sums[0] * shifts) * weights, sums[2]])


def sums_in_torch(
    logits: Float[torch.Tensor, "rows width"], tokens: Int[torch.Tensor, "rows"], temperature: float, valid: int
) -> tuple[Float[torch.Tensor, "rows"], Float[torch.Tensor, "3 rows"]]:
    """What one slice of the vocabulary contributes: `torch.ops.megatron_rl.token_logprob_sums`, without its checks.

    Args:
        logits: float32, bfloat16 or float16. Rows may lie anywhere; the native operator wants each in one piece.
        tokens: int64, positions in the slice; those outside [0, valid) are another rank's.
        temperature: positive; divides the logits.
        valid: the columns that count are those before.

    Returns:
        maxima: of x = logits / temperature, float32; -inf without a valid column.
        sums: float32. sums[0] = sum exp(x - maximum), sums[1] = sum exp(x - maximum) (x - maximum), sums[2] = x of the
            token, 0 where another rank holds it.

    Raises:
        ValueError: on CPU, naming an argument whose shape, dtype, layout or value is wrong.
    """
    rows, width = logits.shape
    maxima = logits.new_full((rows,), -torch.inf, dtype=torch.float32)
    sums = torch.zeros(3, rows, dtype=torch.float32, device=logits.device)
    mine = (tokens >= 0) & (tokens < valid)
    for chunk in _chunks(rows, width if valid else 0):
        scaled = logits[chunk, :valid].float() / temperature
        maxima[chunk] = scaled.amax(-1)
        picked = scaled.gather(1, tokens[chunk].clamp(0, valid - 1)[:, None])[:, 0]
        sums[2, chunk] = torch.where(mine[chunk], picked, torch.zeros_like(picked))
        # A maximum of -inf is bounded: -inf - -inf would be NaN.
        scaled -= maxima[chunk, None].clamp_min(torch.finfo(torch.float32).min)
        weights = scaled.exp()
        sums[0, chunk] = weights.sum(-1)
        sums[1, chunk] = weights.mul_(scaled.clamp_min_(LOWEST)).sum(-1)
    return maxima, sums


def gradient_in_torch(
    logits: Float[torch.Tensor, "rows width"],
    tokens: Int[torch.Tensor, "rows"],
    normalizers: Float[torch.Tensor, "rows"],
    entropies: Float[torch.Tensor, "rows"],
    for_logprobs: Float[torch.Tensor, "rows"] | None,
    for_entropies: Float[torch.Tensor, "rows"] | None,
    temperature: float,
    valid: int,
) -> Float[torch.Tensor, "rows width"]:
    """The gradient of `logits`: `torch.ops.megatron_rl.token_logprob_gradient`, without its checks.

    Args:
        logits, tokens, temperature, valid: as for the sums.
        normalizers: log sum exp(logits / temperature) over the whole vocabulary, float32.
        entropies: of the whole vocabulary, float32.
        for_logprobs: float32, the gradient of the log-probs; None: they have none.
        for_entropies: float32, the gradient of the entropies; None: they have none.

    Returns:
        A tensor of the dtype of `logits`, 0 in the columns from `valid` on.

    Raises:
        ValueError: on CPU, naming an argument whose shape, dtype, layout or value is wrong.
    """
    result = logits.new_zeros(logits.shape)
    mine = (tokens >= 0) & (tokens < valid)
    for chunk in _chunks(len(logits), logits.shape[1] if valid else 0):
        scores = logits[chunk, :valid].float() / temperature - normalizers[chunk, None]
        probabilities = scores.exp()
        gradient = torch.zeros_like(probabilities)
        if for_logprobs is not None:
            # d logprob / d scaled = onehot - p
            gradient -= for_logprobs[chunk, None] * probabilities
            hits = torch.where(mine[chunk], for_logprobs[chunk], torch.zeros_like(for_logprobs[chunk]))
            gradient.scatter_add_(1, tokens[chunk].clamp(0, valid - 1)[:, None], hits[:, None])
        if for_entropies is not None:
            # d entropy / d scaled = -p (log p + entropy)
            surprise = scores.clamp_min_(LOWEST) + entropies[chunk, None]
            gradient -= for_entropies[chunk, None] * probabilities * surprise
        result[chunk, :valid] = (gradient / temperature).to(logits.dtype)
    return result


torch.library.impl("megatron_rl::token_logprob_sums", "default", sums_in_torch)
torch.library.impl("megatron_rl::token_logprob_gradient", "default", gradient_in_torch)


def _chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows with about CHUNK_ELEMENTS logits each; none without columns."""
    step = max(CHUNK_ELEMENTS // max(width, 1), 1)
    return (slice(start, start + step) for start in range(0, rows if width else 0, step))


def _reduce(tensor: torch.Tensor, operation: Any, group: torch.distributed.ProcessGroup) -> None:
    if tensor.numel() and torch.distributed.get_world_size(group) > 1:
        torch.distributed.all_reduce(tensor, operation, group)
