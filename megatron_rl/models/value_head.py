"""Makes a critic of a policy: one number per token in place of the logits."""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_rl.models.gpt import compute_selected_rows_only


class ValueHead(torch.nn.Module):
    """A linear layer to one number, whole on every tensor-parallel rank: they all compute the same from the same.

    It is called as megatron-core calls an output layer. Its weights are 0 at first, so all values are.
    """

    def __init__(self, hidden_size: int, like: torch.Tensor, sequence_parallel: bool) -> None:
        """Args: like: the weight has its dtype and device."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=like.dtype, device=like.device))
        self._sequence_parallel = sequence_parallel

    def forward(self, hidden: torch.Tensor, **unused: Any) -> tuple[torch.Tensor, None]:
        """Float32 values [tokens, 1, 1] of hidden states [tokens, 1, hidden], and no bias."""
        if self._sequence_parallel:
            # Every rank goes on with the same values, so each takes its own part of the gradient instead of their sum.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return torch.nn.functional.linear(hidden.float(), self.weight.float()), None


def attach_value_head(model: GPTModel) -> None:
    """Replace the output layer of this rank's part of a model; nothing to replace on other stages than the last."""
    # Also where the embedding is: it no longer shares its gradient with an output layer.
    model.share_embeddings_and_output_weights = False
    if not model.post_process:
        return
    sequence_parallel = model.config.sequence_parallel
    like = model.decoder.final_layernorm.weight
    model.output_layer = ValueHead(model.config.hidden_size, like, sequence_parallel)
    if not sequence_parallel:
        compute_selected_rows_only(model)
