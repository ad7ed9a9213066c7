"""Attention over packed sequences, for layers without Transformer Engine."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.models.context_parallel import join


@dataclass
class PackedSequences(PackedSeqParams):
    """megatron-core's description of a packed row, with the row's layout as a padded batch.

    `padded_index[i]` is the place of packed token i in a [sequences * longest] grid of right-padded sequences.
    """

    padded_index: torch.Tensor = field(kw_only=True)
    sequences: int = field(kw_only=True)
    held: torch.Tensor | None = field(kw_only=True)
    """Places of the row that this context-parallel rank holds; None: all."""

    @classmethod
    def from_lengths(
        cls, lengths: list[int], device: torch.device, held: torch.Tensor | None = None
    ) -> "PackedSequences":
        """Describe consecutive sequences of the given lengths in one packed row, of which this rank holds `held`."""
        sizes = torch.tensor(lengths, dtype=torch.int32)
        cumulative = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cumulative[1:] = sizes.cumsum(0)
        longest = max(lengths)
        shift = torch.arange(len(lengths)) * longest - cumulative[:-1]
        padded_index = torch.arange(int(cumulative[-1])) + shift.repeat_interleave(sizes)
        cu_seqlens = cumulative.to(device)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            padded_index=padded_index.to(device),
            sequences=len(lengths),
            held=None if held is None else held.to(device),
        )


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a packed row: a `core_attention` for megatron-core's local layers.

    It keeps to the config's `window_size`, as megatron-core's own does.

    The linear layers around it see packed tokens only; here the row is unpacked into a right-padded batch, where
    causality alone keeps real tokens from seeing padding.

    Of a row that is dealt to context-parallel ranks, each rank gets all keys and values, and computes with queries of
    zero in the positions of the others: right, but with nothing saved here. Transformer Engine's attention saves.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **unused: Any
    ) -> None:
        super().__init__(config=config)
        self._scale = softmax_scale
        self._window = None if config.window_size is None else config.window_size[0] + 1

    def forward(
        self,
        query: Float[torch.Tensor, "tokens heads head_dim"],
        key: Float[torch.Tensor, "tokens kv_heads head_dim"],
        value: Float[torch.Tensor, "tokens kv_heads head_dim"],
        attention_mask: None,
        packed_seq_params: PackedSequences,
        **unused: Any,
    ) -> Float[torch.Tensor, "tokens heads_times_head_dim"]:
        """Attend; dtypes as given. `attention_mask` is not used: the packing says what is visible."""
        packing = packed_seq_params
        if packing.held is not None:
            total, group = len(packing.padded_index), parallel_state.get_context_parallel_group()
            key, value = (join(part, packing.held, total, group, sum_gradients=True) for part in (key, value))
            query = query.new_zeros(total, *query.shape[1:]).index_copy(0, packing.held, query)
        grid = packing.sequences, packing.max_seqlen_q

        def unpack(packed: torch.Tensor) -> torch.Tensor:
            padded = packed.new_zeros(grid[0] * grid[1], *packed.shape[1:])
            padded = padded.index_copy(0, packing.padded_index, packed)
            return padded.view(*grid, *packed.shape[1:]).transpose(1, 2)

        groups = query.shape[1] // key.shape[1]
        mask = self._mask(packing.max_seqlen_q, query.device)
        output = F.scaled_dot_product_attention(
            unpack(query),
            unpack(key).repeat_interleave(groups, 1),
            unpack(value).repeat_interleave(groups, 1),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._scale,
        )
        positions = packing.padded_index if packing.held is None else packing.padded_index[packing.held]
        return output.transpose(1, 2).flatten(0, 1)[positions].flatten(1)

    def _mask(self, length: int, device: torch.device) -> torch.Tensor | None:
        """[length, length], true where row may see column; None: all before it."""
        if self._window is None or self._window >= length:
            return None
        positions = torch.arange(length, device=device)
        distance = positions[:, None] - positions
        return (distance >= 0) & (distance < self._window)
