"""Begins with another commit of the model on each rank, and prints what is said to that."""

from megatron_rl.config import Config, ConfigError
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.preflight import begin


def main() -> None:
    values = {"model": {"path": "m", "precision": "fp32"}, "parallel": {"dp_size": 2}, "run_dir": "unused"}
    runtime = initialize(Config.model_validate(values))
    try:
        begin(Config.model_validate(values | {"model": {"path": f"Org/Name@{runtime.rank}"}}), runtime)
    except ConfigError as error:
        print(f"rank {runtime.rank}: {error}")
    shutdown()


if __name__ == "__main__":
    main()
