"""A trainer process of a run whose engine has to be on another host: two_hosts_worker FILE.

Where the engine goes is left to Ray, which is told that it needs the GPU that only the other host says it has.
"""

import sys
from dataclasses import replace
from typing import Any

from megatron_rl import train
from megatron_rl.config import load_config
from megatron_rl.distributed.engine_environment import engine_environment
from rollout.engine.engine_arguments import EngineEnvironment

engine_environment = engine_environment


def with_gpu(*arguments: Any) -> EngineEnvironment:
    return replace(engine_environment(*arguments), gpus=1.0)


if __name__ == "__main__":
    engine_environment = with_gpu
    train.run(load_config(sys.argv[1], []))
