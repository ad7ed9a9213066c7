"""Joins a process group of its own and stays in it until its standard input ends: runtime_worker."""

import sys

import torch

from megatron_rl.config import Config
from megatron_rl.distributed.device import shared_store
from megatron_rl.distributed.runtime import initialize, shutdown


def main() -> None:
    runtime = initialize(Config.model_validate({"model": {"path": "unused"}, "run_dir": "unused"}))
    total = torch.tensor(1)
    torch.distributed.all_reduce(total, group=runtime.control_group)
    shared_store().set("a", "1")
    print(f"together {total.item()}", flush=True)
    sys.stdin.read()
    shutdown()


if __name__ == "__main__":
    main()
