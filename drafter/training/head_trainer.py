"""Trains the head slice by slice: many small backward passes on every rank, and one optimizer step of all together.

A slice adds the gradient of one packed row to what this rank has. `flush`, once per step of the run, adds up the
gradients and weights of all ranks, whatever number of slices each has run, and all of them take the same step. Losses
are sums (see `drafter.eagle.draft_loss`), so the result is that of one large batch.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drafter.eagle.draft_loss import LossOptions, draft_loss
from drafter.eagle.head import EagleHead
from drafter.eagle.packed_rows import FrozenPolicy, PackedFeatures
from drafter.idle_time.slices import Fits
from drafter.training.feature_store import FeatureStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW, as EAGLE trains its heads."""

    lr: float = 1e-4
    """After the warm-up."""
    warmup_steps: int = 10
    """Optimizer steps over which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    decay_all: bool = False
    """Let norms and biases decay, too."""
    clip_grad: float = 0.5
    """Gradients of the mean loss are scaled down to this global norm."""


@dataclass(frozen=True)
class Flush:
    """What one optimizer step was taken from, over all ranks."""

    slices: int
    loss: float
    """Mean cross-entropy of a counted draft token, in nats; nan when nothing counted."""
    grad_norm: float
    """Before clipping."""
    stepped: bool
    """False when nothing counted, or the gradient was not finite and was dropped."""


class _RowSlice:
    """The forward and backward pass of one row."""

    def __init__(self, trainer: "DraftTrainer", lengths: list[int]) -> None:
        self._trainer, self._windows = trainer, len(lengths)
        self.size = sum(lengths)

    def run(self) -> None:
        self._trainer.learn(self._trainer.store.take(self._windows))


class DraftTrainer:
    """The source of training slices (`drafter.idle_time.slices.SliceSource`), and the optimizer behind it."""

    def __init__(self, head: EagleHead, store: FeatureStore, loss: LossOptions, options: OptimizerOptions) -> None:
        """
        Args:
            head: the same on all ranks; its device is that of the training.
            store: the training data.
            loss: weights of the parts of the loss.
            options: of the optimizer.
        """
        self.head, self.store = head, store
        self.policy: FrozenPolicy | None = None
        """The weights that the newest features of the store were computed with; without them there are no slices."""
        self.updates = 0
        """Optimizer steps taken."""
        self.slices = 0
        """Slices run on this rank since the last flush."""
        self.tokens = 0
        """Tokens of those slices."""
        self._loss, self._options = loss, options
        self._parameters = list(head.parameters())
        self.reset_optimizer()
        self._clear()

    def reset_optimizer(self) -> None:
        """Forget the moments of the gradients."""
        options = self._options
        exempt = [] if options.decay_all else [each for each in self._parameters if each.ndim == 1]
        groups: list[dict[str, Any]] = [{"params": self._parameters}]
        if options.weight_decay and exempt:
            decayed = [each for each in self._parameters if each.ndim > 1]
            groups = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            groups, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay
        )

    def _clear(self) -> None:
        self._optimizer.zero_grad()
        self.slices = self.tokens = 0
        self._sums = torch.zeros(3, device=self._parameters[0].device)  # weight, cross-entropy, counted tokens

    def next(self, fits: Fits) -> _RowSlice | None:
        """The next slice, or None while there is no training data; the row is halved until it fits."""
        most = self.store.tokens_per_row
        lengths = self.store.next_windows(most) if self.policy is not None else []
        while len(lengths) > 1 and not fits(sum(lengths)):
            most = min(most, sum(lengths)) // 2
            lengths = self.store.next_windows(most)
        return _RowSlice(self, lengths) if lengths else None

    def learn(self, row: PackedFeatures) -> None:
        """Add the gradient of one row."""
        assert self.policy is not None
        result = draft_loss(self.head, row.to(self._sums.device), self.policy, self._loss)
        result.total.backward()  # type: ignore[no-untyped-call]
        self._sums += torch.stack([result.weight, result.step_cross_entropy.sum(), result.step_counts.sum()])
        self.slices += 1
        self.tokens += len(row.token_ids)

    def flush(self, group: torch.distributed.ProcessGroup | None = None) -> Flush:
        """Take one optimizer step with the slices of all ranks. A collective operation.

        Args:
            group: all ranks that train the head, able to move tensors of its device; None: the default group.
        """
        flat = torch.cat([self._flat_gradient(), self._sums, self._sums.new_tensor([self.slices])])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat, group=group)
        weight, entropy, counted, slices = flat[-4:].tolist()
        self._clear()
        norm = float(flat[:-4].norm()) / weight if weight > 0 else 0.0
        report = Flush(
            slices=round(slices),
            loss=entropy / counted if counted else float("nan"),
            grad_norm=norm,
            stepped=weight > 0 and norm < float("inf"),  # false for nan
        )
        if report.stepped:
            self._step(flat[:-4] / weight, norm)
        elif weight != 0:
            log.warning("the drafter's gradient is not finite; this step of its training is dropped.")
        return report

    def _flat_gradient(self) -> Tensor:
        # Ranks that ran no slice contribute zeros.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        return torch.cat([gradient.reshape(-1).float() for gradient in gradients])

    def _step(self, gradient: Tensor, norm: float) -> None:
        options = self._options
        gradient = gradient * min(options.clip_grad / max(norm, 1e-12), 1.0)
        parts = gradient.split([parameter.numel() for parameter in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        for group in self._optimizer.param_groups:
            group["lr"] = options.lr * min((self.updates + 1) / max(options.warmup_steps, 1), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.updates += 1

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, right after a flush: the same on all ranks, tensors included."""
        return {
            "head": self.head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "updates": self.updates,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()` of an earlier trainer of a head with the same shape."""
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
