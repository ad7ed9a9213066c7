"""One JSON object per step in `run_dir/metrics.jsonl`, and wandb beside it when configured.

The names and units of all metrics are in `docs/metrics.md`.
"""

import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.config import Config, ConfigError

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb-run-id"


class MetricsLogger:
    """Appends metrics to the run folder; a line that `log` has returned from survives a crash."""

    def __init__(self, config: Config, start_step: int) -> None:
        """Open the run's metrics for appending.

        Args:
            config: the experiment.
            start_step: first step that this process will log; lines of this step and later ones, which a run that
                was killed after its last checkpoint has left behind, are dropped, and so is a torn last line.

        Raises:
            ConfigError: when wandb is configured and cannot start.
        """
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        if path.exists():
            _keep_steps_before(path, start_step)
        # wandb first: when it cannot start, no file is left open.
        self._wandb = _start_wandb(config) if config.track.wandb.mode != "disabled" else None
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of one step; nan and infinity become null, which every JSON reader understands."""
        values = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def close(self) -> None:
        """Close the file and finish the wandb run."""
        self._file.close()
        if self._wandb is not None:
            import wandb

            self._wandb.finish()
            wandb.teardown()  # `finish` returns before the run is on disk; this waits for its writer


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The steps of a run in order, each a dict with `step`; several lines of one step are merged, null becomes nan.

    Raises:
        ConfigError: when the folder has no metrics.
    """
    path = run_dir / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the run_dir of a run that has logged a step.") from None
    steps: dict[int, dict[str, float]] = {}
    for line in lines:
        record = _parse(line)
        if record is not None:
            values = {name: math.nan if value is None else value for name, value in record.items()}
            steps.setdefault(record["step"], {}).update(values)
    if not steps:
        raise ConfigError(f"{path} is empty; give the run_dir of a run that has logged a step.")
    return [steps[step] for step in sorted(steps)]


def _parse(line: str) -> dict[str, Any] | None:
    """The line's object, or None for a line that a crash has torn."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _keep_steps_before(path: Path, start_step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        record = _parse(line)
        if record is not None and record["step"] < start_step:
            kept.append(line + "\n")
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(kept), encoding="utf-8")
    draft.replace(path)


def _start_wandb(config: Config) -> Any:
    settings = config.track.wandb
    run_dir = Path(config.run_dir)
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"track.wandb.mode={settings.mode} but wandb is not installed; "
            "install it (pip install wandb) or set track.wandb.mode=disabled."
        ) from None
    id_file = run_dir / WANDB_ID_FILE
    if not id_file.exists():  # a resumed run continues the same wandb run
        id_file.write_text(uuid.uuid4().hex[:8] + "\n")
    try:
        return wandb.init(
            project=settings.project,
            name=settings.name or run_dir.name,
            id=id_file.read_text().strip(),
            resume="allow" if settings.mode == "online" else None,
            mode=settings.mode,
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except (wandb.Error, OSError) as error:
        raise ConfigError(
            f"wandb could not start in mode {settings.mode} ({' '.join(str(error).split())}); "
            "run `wandb login`, or set track.wandb.mode to offline or disabled."
        ) from None
