"""CISPO: the ratio is clipped, but no token loses its gradient."""

from jaxtyping import Bool, Float
from torch import Tensor

from megatron_rl.algorithms.base import PolicyTokens
from megatron_rl.algorithms.grpo import Grpo
from megatron_rl.algorithms.loss import safe_exp


class Cispo(Grpo):
    """GRPO's advantages, with the loss `-stop_grad(clip(r, 1 - clip_low, 1 + clip_high)) A new`.

    Source: MiniMax-M1, arXiv 2506.13585, equations 4 and 5; without a lower bound, as there. It does not tell its upper
    bound; the default is a largest ratio of 5. `algorithm.dual_clip` does not apply.
    """

    def token_loss(self, tokens: PolicyTokens) -> tuple[Float[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
        """REINFORCE with a clipped importance weight; the mask has the tokens whose weight was clipped."""
        ratio = safe_exp((tokens.new_logprobs - tokens.old_logprobs).detach())
        weight = ratio.clamp(1 - self.settings.clip_low, 1 + self.settings.clip_high)
        return -weight * tokens.advantages * tokens.new_logprobs, weight != ratio
