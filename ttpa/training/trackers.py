"""Where a run's metrics go beside metrics.jsonl: TensorBoard and Weights & Biases, if asked for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ttpa.config import nearest
from ttpa.errors import InputError

TRACKERS = ("tensorboard", "wandb")


class Tracker(Protocol):
    """Takes the metrics of a run, each at the number of optimizer steps done."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the metrics of one step."""

    def close(self, *, failed: bool) -> None:
        """Write out what is left; `failed` says that the run ends with an exception."""


def tracker_names(report_to: str) -> list[str]:
    """The trackers of `--report_to`, a comma list; "none" is an empty one. Raises InputError for an unknown name and
    for a tracker that is not installed."""
    names = [] if report_to == "none" else [name.strip() for name in report_to.split(",")]
    for name in names:
        if name not in TRACKERS:
            close = nearest(name, TRACKERS)
            hint = f"did you mean {close}?" if close else f"there are {', '.join(TRACKERS)}"
            raise InputError(f"--report_to: there is no {name!r}; {hint}")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--report_to {name}: it is not installed; pip install {name}")
    return list(dict.fromkeys(names))


def open_trackers(
    names: Sequence[str], folder: Path, *, step: int, run_id: str, options: Mapping[str, Any]
) -> list[Tracker]:
    """Open trackers for a run folder whose run goes on behind `step`; `run_id` is the run's id in Weights & Biases, and
    `options` what it shows as the configuration. Raises InputError where Weights & Biases refuses."""
    opened: list[Tracker] = []
    if "tensorboard" in names:
        opened.append(TensorBoard(folder, step=step))
    if "wandb" in names:
        opened.append(WeightsAndBiases(folder, run_id=run_id, options=options))
    return opened


class TensorBoard:
    """Event files in the folder `tensorboard`; what an interrupted run wrote behind `step` is hidden."""

    def __init__(self, folder: Path, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics through to the file, so that a killed run keeps them."""
        for name, value in _grouped(metrics).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, *, failed: bool) -> None:
        """Close the file."""
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, named as the run folder, in the project that WANDB_PROJECT names, else `ttpa`; the
    library's own variables (WANDB_MODE=offline) count. A run of the same id goes on."""

    def __init__(self, folder: Path, *, run_id: str, options: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would report its own crashes
        import wandb

        try:
            self.run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "ttpa"),
                name=folder.name,
                id=run_id,
                resume="allow",
                dir=folder,
                config=dict(options),
            )
        except wandb.Error as error:
            raise InputError(
                f"--report_to wandb: {error}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hand the metrics over; those of a step that the run already has are ignored there."""
        self.run.log(_grouped(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        """Wait until everything is handed over, and say how the run ended."""
        self.run.finish(exit_code=int(failed))


def _grouped(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics under the names that transformers' Trainer gives them there: train/..., eval/..."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in metrics.items()
    }
