"""Saves a small checkpoint and then one that is too big for its disk: full_disk_worker MODEL RUN_DIR.

Prints the error, as every process sees it.
"""

import sys

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_rl.config import Config
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.models.megatron_folder import write_model_folder
from megatron_rl.trainer.checkpoint import checkpoint_folder


def main() -> None:
    model, run_dir = sys.argv[1:]
    runtime = initialize(Config.model_validate({"model": {"path": model}, "run_dir": run_dir}))
    for step, size in ((1, 1000), (2, 1_000_000)):
        part = ShardedTensor.from_rank_offsets("weights", torch.zeros(size), (0, runtime.rank, runtime.world_size))
        try:
            write_model_folder({"weights": part}, model, checkpoint_folder(run_dir, step))
        except RuntimeError as error:
            # In one piece: both ranks print at once.
            sys.stdout.write(f"rank {runtime.rank}: {error}\n")
            sys.stdout.flush()
    shutdown()


if __name__ == "__main__":
    main()
