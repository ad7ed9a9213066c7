"""The routers of a mixture of experts, as the trainer sees them: their own losses, and how they load the experts."""

import math
from typing import Any

import torch
from jaxtyping import Float
from megatron.core.models.gpt import GPTModel

from megatron_rl.config import Config


class Routing:
    """Sets the weights of the routers' losses, and counts the tokens of each expert, for one optimizer step each."""

    def __init__(self, model: GPTModel, config: Config) -> None:
        """Watch the routers.

        Args:
            model: this rank's part of a model with experts.
            config: the experiment.
        """
        self._config = config
        self._routers = {layer.layer_number: layer.mlp.router for layer in model.decoder.layers}
        self._counts = torch.zeros(model.config.num_layers, model.config.num_moe_experts)
        for number, router in self._routers.items():
            router.register_forward_hook(self._counting(number - 1))

    def _counting(self, layer: int) -> Any:
        def count(router: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            # Without gradients: a pass for log-probs, or the first one of a layer that is computed again.
            if router.training and torch.is_grad_enabled():
                self._counts[layer] += output[1].sum(0).cpu()

        return count

    def start(self, tokens: int) -> None:
        """Before the passes of an optimizer step over `tokens` tokens, prompts included, in all replicas together.

        The losses are then means over these tokens: megatron-core multiplies each micro-batch's with its tokens on this
        rank, and leaves the division to a normalisation by counted tokens, of which the trainer counts none.
        """
        self._counts.zero_()
        parallel = self._config.parallel
        # Where peers share a micro-batch, each multiplies with its own tokens, of a loss that is divided by them.
        share = parallel.tp_size * parallel.cp_size / tokens
        for router in self._routers.values():
            router.config.moe_aux_loss_coeff = self._config.train.router_aux_loss * share
            router.config.moe_z_loss_coeff = self._config.train.router_z_loss * share or None

    def metrics(self, group: torch.distributed.ProcessGroup) -> dict[str, float]:
        """`moe/*` of `docs/metrics.md` for the passes since `start`; a collective operation of `group`, all ranks."""
        torch.distributed.all_reduce(self._counts, group=group)
        return load_metrics(self._counts)


def load_metrics(counts: Float[torch.Tensor, "layers experts"]) -> dict[str, float]:
    """How evenly the experts of each layer are loaded, by the names of `docs/metrics.md`.

    Args:
        counts: tokens that each expert got, float32; no layer without any.
    """
    shares = counts / counts.sum(1, keepdim=True)
    experts = counts.shape[1]
    return {
        "moe/load_max": float(shares.max()) * experts,
        "moe/load_entropy": float(torch.special.entr(shares).sum(1).mean()) / math.log(experts),
        "moe/idle_fraction": float((counts == 0).float().mean()),
    }
