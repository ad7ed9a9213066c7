"""What happens in which step: the learning rate, and whether something is due."""

import torch

from megatron_rl.config.sections import TrainConfig


def learning_rate(train: TrainConfig, update: int, total_updates: int) -> float:
    """Learning rate of optimizer step `update` (counted from 0): linear warm-up, then the configured decay."""
    if update < train.warmup_steps:
        return train.lr * (update + 1) / train.warmup_steps
    span = max(total_updates - train.warmup_steps, 1)
    progress = min((update - train.warmup_steps) / span, 1.0)
    if train.lr_schedule == "constant":
        share = 1.0
    elif train.lr_schedule == "linear":
        share = 1 - progress
    else:
        share = 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))
    return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * share)


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every `every` steps (0: never) and after the last one happens now."""
    return step == last or (every > 0 and step % every == 0)
