"""Brings up the rollout fleet and connects it with a trainer's weights."""

from typing import Any

from megatron_rl.config import Config
from megatron_rl.distributed.coordinator import Coordinator
from megatron_rl.distributed.engine_environment import engine_environment
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.distributed.watchdog import leave
from megatron_rl.models.token_ids import TokenIds
from megatron_rl.models.weights import PolicyWeights
from megatron_rl.stateful import Stateful
from megatron_rl.trainer.weight_sync import WeightSync
from rollout.fleet.fleet import RolloutFleet
from rollout.fleet.ray_watch import RayWatch


class LearnedSpeculation:
    """What the engines' adaptive speculation has learned, for checkpoints."""

    def __init__(self, engines: RolloutFleet) -> None:
        self._engines = engines

    def state(self) -> Any:
        """Per engine; see `RolloutFleet.speculation_states`."""
        return self._engines.speculation_states()

    def restore(self, state: Any) -> bool:
        """Go on from `state()`, of a fleet of any size."""
        self._engines.restore_speculation(state)
        return True


class FleetConnection:
    """The engines of a run, and the way of the weights to them. On every rank."""

    def __init__(self, config: Config, runtime: Runtime, coordinator: Coordinator, backend: str) -> None:
        """To be made by `start_fleet`; `backend` carries the weights: shm, ipc or nccl."""
        self._config, self._runtime, self._coordinator, self._backend = config, runtime, coordinator, backend
        self._weight_sync: WeightSync | None = None
        self._ray_watch: RayWatch | None = None
        self.engines: RolloutFleet | None = None
        """On the driver; None elsewhere."""

    def start_engines(self, engines: RolloutFleet) -> None:
        """Take over the driver's engines, which are starting, and leave the process when Ray dies under them."""
        self.engines, self._ray_watch = engines, RayWatch(leave)

    def connect(self, weights: PolicyWeights) -> WeightSync:
        """Wait until the engines are up and connect them; they generate nothing of use before the first sync.

        Raises:
            ConfigError: when `rollout.vllm` has options that vLLM does not take.
            RuntimeError: when an engine does not start.
        """
        if self.engines is not None:
            self.engines.wait_until_up()
        self._weight_sync = WeightSync(
            self._config, self._runtime, weights, self._backend, self.engines, self._coordinator
        )
        return self._weight_sync

    def restore(self, engine: int) -> None:
        """Give a restarted engine the current weights; the engines' `on_restart`.

        Raises:
            RuntimeError: when nothing is connected yet, or as `WeightSync.restore`.
        """
        if self._weight_sync is None:
            raise RuntimeError(f"rollout engine {engine} died before it had any weights.")
        self._weight_sync.restore(engine)

    def parts(self) -> dict[str, Stateful]:
        """What checkpoints carry of the engines, by name."""
        return {"speculation": LearnedSpeculation(self.engines)} if self.engines is not None else {}

    def shutdown(self) -> None:
        """Release the connection and stop the engines."""
        if self._ray_watch is not None:
            self._ray_watch.close()
        if self._weight_sync is not None:
            self._weight_sync.shutdown()
        if self.engines is not None:
            self.engines.shutdown()


def start_fleet(
    config: Config, runtime: Runtime, coordinator: Coordinator, tokens: TokenIds, drafter_path: str | None = None
) -> FleetConnection:
    """Start the engines on the driver, without waiting for them; to be called on every rank.

        fleet = start_fleet(config, runtime, coordinator, tokens)
        policy = ...  # while the engines start
        fleet.connect(PolicyWeights(policy.model, arch)).sync(version)
        ...
        fleet.shutdown()

    Args:
        config: the experiment; `model.path` says what shape the engines' model has.
        runtime: this process's place.
        coordinator: brings all ranks together when an engine has to get its weights again.
        tokens: which ids can be sampled, and which end a response.
        drafter_path: folder of the EAGLE head that the engines start with; None: `drafter.path`.

    Raises:
        ConfigError: when the config does not fit this machine.
    """
    environment = engine_environment(config, tokens.limit, tokens.ends)
    fleet = FleetConnection(config, runtime, coordinator, environment.weight_sync)
    if runtime.is_driver:
        fleet.start_engines(
            RolloutFleet(
                config,
                environment,
                config.model.path,
                on_restart=fleet.restore,
                wait=False,
                drafter_path=drafter_path,
            )
        )
    return fleet
