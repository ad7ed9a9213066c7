"""GSPO: the ratio of a whole response decides about clipping."""

from jaxtyping import Bool, Float
from torch import Tensor

from megatron_rl.algorithms.base import PolicyTokens
from megatron_rl.algorithms.grpo import Grpo
from megatron_rl.algorithms.loss import bounded_exp, clipped_loss


class Gspo(Grpo):
    """GRPO's advantages, with the ratio `s = exp(mean_t(new_t - old_t))` of the response in place of the token's.

    Source: Zheng et al., "Group sequence policy optimization", arXiv 2507.18071, equations 5 to 7, in the form of its
    GSPO-token (equations 13 and 14), whose value and gradient are the same here: every token has the response's ratio
    and the gradient of its own log-prob, `s grad(new_t)`. Rejected tokens have no part in the mean.
    """

    def token_loss(self, tokens: PolicyTokens) -> tuple[Float[Tensor, "tokens"], Bool[Tensor, "tokens"]]:
        """PPO's loss with the response's ratio."""
        new, settings = tokens.new_logprobs, self.settings
        log_ratio = tokens.sequence_mean((new - tokens.old_logprobs).detach())
        # The difference is 0, but has the gradient of the token's own log-prob.
        ratio = bounded_exp(log_ratio + (new - new.detach()))
        return clipped_loss(ratio, tokens.advantages, settings.clip_low, settings.clip_high, settings.dual_clip)
