"""The head's loss: training-time test against the policy's own distribution (EAGLE-3, arXiv 2503.01840).

The draft is unrolled as the engine uses it: step i reads the head's own output of step i - 1, with the tokens that the
policy really sampled. Each step's target is soft, the policy's distribution at temperature 1, restricted to the draft
vocabulary and renormalised there; tokens that engines never sample (see `FrozenPolicy`) are left out. As in EAGLE-3, a
position does not count when the policy's most likely token is outside the draft vocabulary. For `eagle` heads a smooth
L1 distance to the policy's hidden states can be added (EAGLE, arXiv 2401.15077, uses it with weight 1 and the
cross-entropy with 0.1).

Everything is a sum: losses and weights of several rows add up to those of the row that packs them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from drafter.eagle.head import EagleHead
from drafter.eagle.packed_rows import FrozenPolicy, PackedFeatures, counted_drafts, to_target_positions


@dataclass(frozen=True)
class LossOptions:
    """Weights of the parts of the loss, and its working memory."""

    steps: int = 7
    """Unrolled steps: draft tokens per anchor."""
    decay: float = 0.8
    """Step i has the weight decay ** i."""
    cross_entropy: float = 1.0
    """Factor of the cross-entropy."""
    hidden: float = 0.0
    """Factor of the smooth L1 distance between the head's states and the policy's final hidden states (`eagle`)."""
    rows_at_once: int = 256
    """Positions whose logits exist at the same time: the policy's, and those of all steps."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows_at_once < 1:
            raise ValueError(f"steps={self.steps} and rows_at_once={self.rows_at_once} have to be at least 1.")


@dataclass(frozen=True)
class DraftLoss:
    """Sums over the counted steps of a row. Divide at the end, by the weight of all rows of an optimizer step."""

    total: Float[Tensor, ""]
    """Weighted loss, with its gradient; float32."""
    weight: Float[Tensor, ""]
    """Sum of decay ** i over what counted."""
    step_cross_entropy: Float[Tensor, "steps"]
    """Unweighted cross-entropy of each step, in nats, detached."""
    step_counts: Float[Tensor, "steps"]
    """How many anchors counted in each step."""


def draft_loss(
    head: EagleHead, features: PackedFeatures, policy: FrozenPolicy, options: LossOptions | None = None
) -> DraftLoss:
    """The loss of one packed row.

    Args:
        head: gradients reach its parameters, and nothing else.
        features: the row.
        policy: the weights that `features` were computed with.
        options: None means the defaults.

    Raises:
        ValueError: `options` has a distance to hidden states for an `eagle3` head, whose states mean something else.
    """
    options = options or LossOptions()
    if options.hidden and head.config.kind != "eagle":
        raise ValueError("The smooth L1 distance to the policy's hidden states is for eagle heads only.")
    states = to_target_positions(unroll(head, features, policy, options.steps))
    counted = to_target_positions(counted_drafts(features.response_mask, features.cu_seqlens, options.steps))
    proposed = head.proposed_ids(len(policy.lm_head))
    losses, entropies, counts = [], [], []
    for start in range(0, len(features.token_ids), options.rows_at_once):
        rows = slice(start, start + options.rows_at_once)
        # Recomputed in the backward pass, so that the logits of one chunk are in memory, never those of the row.
        loss, entropy, count = checkpoint(
            _chunk, head, policy, proposed, states[:, rows], features.final_hidden[rows], counted[:, rows], options,
            use_reentrant=False,
        )  # fmt: skip
        losses.append(loss)
        entropies.append(entropy)
        counts.append(count)
    decays = options.decay ** torch.arange(options.steps, device=counted.device, dtype=torch.float32)
    step_counts = torch.stack(counts).sum(dim=0)
    return DraftLoss(
        total=(torch.stack(losses).sum(dim=0) * decays).sum(),
        weight=(step_counts * decays).sum(),
        step_cross_entropy=torch.stack(entropies).sum(dim=0),
        step_counts=step_counts,
    )


def unroll(
    head: EagleHead, features: PackedFeatures, policy: FrozenPolicy, steps: int
) -> Float[Tensor, "steps seq hidden"]:
    """The head's states in every step, by anchor, with the row's own tokens as input.

    At the end of a sequence the input tokens are those of the next one. Such steps do not count, and they do not change
    any step that does: no later anchor of the sequence attends to them.

    Args:
        head: the drafter.
        features: the row.
        policy: the weights that `features` were computed with.
        steps: draft tokens per anchor.
    """
    drafts = head.start(features.hidden_states, features.cu_seqlens)
    embedding = policy.embedding.detach()
    return torch.stack([drafts.step(embedding[features.token_ids.roll(-1 - step)]) for step in range(steps)])


def _chunk(
    head: EagleHead,
    policy: FrozenPolicy,
    proposed: Int[Tensor, "proposed"],
    states: Float[Tensor, "steps rows hidden"],
    final_hidden: Float[Tensor, "rows hidden"],
    counted: Bool[Tensor, "steps rows"],
    options: LossOptions,
) -> tuple[Float[Tensor, "steps"], Float[Tensor, "steps"], Float[Tensor, "steps"]]:
    """Loss, detached cross-entropy and number of counted positions of each step, over one chunk of positions."""
    with torch.no_grad():
        policy_logits = F.linear(final_hidden, policy.lm_head).float()
        counted = counted & head.t2d[policy_logits.argmax(dim=-1)]
        target = policy_logits[:, proposed].softmax(dim=-1)
    draft_logits = head.logits(states, policy.lm_head.detach())[..., : len(proposed)]
    draft_logprobs = draft_logits.float().log_softmax(dim=-1)
    # `where` and not a product: what does not count may be any value, nan included, and adds nothing to the gradient.
    entropy = torch.where(counted, -(target * draft_logprobs).sum(dim=-1), 0.0).sum(dim=-1)
    loss = options.cross_entropy * entropy
    if options.hidden:
        goal = final_hidden.float().expand_as(states)
        distance = F.smooth_l1_loss(states.float(), goal, reduction="none").mean(dim=-1)
        loss = loss + options.hidden * torch.where(counted, distance, 0.0).sum(dim=-1)
    return loss, entropy.detach(), counted.float().sum(dim=-1)
