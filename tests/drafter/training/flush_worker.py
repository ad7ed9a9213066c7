"""Rank 0 runs no slice and rank 1 two, and both take one step together: flush_worker OUTPUT."""

import sys
from pathlib import Path

import torch

from tests.drafter.policies import random_row
from tests.drafter.training.test_head_trainer import CONFIG, make_trainer, new_head


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    trainer = make_trainer(new_head())
    for seed in ([], [0, 1])[rank]:
        trainer.learn(random_row(CONFIG, [9 + seed], seed=seed))
    own = trainer.slices
    report = trainer.flush()
    head = trainer.head.state_dict()
    torch.save({"head": head, "slices": report.slices, "own": own}, Path(sys.argv[1]) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
