"""The progress of a run and its metrics: one bar, metrics.jsonl, and the trackers that were asked for."""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from tqdm import tqdm

from ttpa.errors import InputError
from ttpa.training.hardware import device_flops, peak_memory
from ttpa.training.run_folder import RunFolder
from ttpa.training.trackers import Tracker, open_trackers, tracker_names
from ttpa.world import World

Metrics = Mapping[str, float]
UNREPEATABLE = ("/s", "seconds", "mfu", "memory_gib")
"""How the names of those fields of metrics.jsonl end that differ when a run is repeated: they tell of the machine."""


@dataclass(frozen=True)
class Work:
    """What optimizer steps process, over all processes: pairs, packed tokens, the tokens of a trainer that computes
    every pair as two rows of its own, and the floating-point operations of the packed tokens, forward and backward."""

    pairs: int = 0
    tokens: int = 0
    equivalent_tokens: int = 0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.pairs + other.pairs,
            self.tokens + other.tokens,
            self.equivalent_tokens + other.equivalent_tokens,
            self.flops + other.flops,
        )


class Monitor:
    """Counts the steps of a run and tells of them; every process has one, and that of process 0 shows and writes.

    A line of metrics.jsonl is due at the first step of a round, at every `logging_steps`-th and at the last. It holds
    the mean of each metric over the steps since the line before that gave it, finite values alone (null where there are
    none), and what is true at the step: epoch,
    step, learning rate, `num_tokens` (packed, since the round began), `sharing` (equivalent tokens over packed ones),
    `tokens/s`, `equivalent_tokens/s`, `pairs/s` (over all processes, time in `paused` left out), `mfu` (operations per
    second over the highest rate of the GPUs in bfloat16; only for a GPU of `PEAK_FLOPS`), and `memory_gib` (the most
    that process 0 has had). Raises InputError for a wrong `report_to`.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        logging_steps: int,
        report_to: str = "none",
        options: Mapping[str, Any] | None = None,
        world: World | None = None,
    ) -> None:
        self.run, self.logging_steps, self.world = run, logging_steps, world or World()
        self.trackers, self.options = tracker_names(report_to), options or {}
        self.path = run.path / "metrics.jsonl"
        self.round = self.step_of_round = self.total_steps = self.steps_before = self.num_tokens = 0
        self.window: dict[str, list[float]] = {}  # of each metric, sum and number of steps since the last line
        self.window_work = Work()
        self.run_id = secrets.token_hex(8)
        self._open: list[Tracker] | None = None
        self._bar: tqdm[Any] | None = None
        self._latest: dict[str, float] = {}  # what the bar shows, some of it measured only where a line is due
        self._speeds: dict[str, float] = {}
        self._peak = device_flops(self.world.device)
        self._restart_clock()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:  # closes all, whatever one of them raises
            for tracker in self._open or []:
                stack.callback(partial(tracker.close, failed=kind is not None))
            if self._bar is not None:
                stack.callback(self._bar.close)
        self._open, self._bar = None, None

    @property
    def steps(self) -> int:
        """The optimizer steps done, over all rounds."""
        return self.steps_before + self.step_of_round

    @property
    def due(self) -> bool:
        """Whether the step that is under way ends with a line, so that what costs time to measure is measured."""
        number = self.step_of_round + 1
        return number in (1, self.total_steps) or number % self.logging_steps == 0

    def start_round(self, number: int, *, total_steps: int) -> None:
        """Show the bar of a round, from 1, of so many optimizer steps; a round that was restored goes on."""
        if number != self.round:
            self.steps_before, self.step_of_round, self.num_tokens = self.steps, 0, 0
            self.window, self.window_work = {}, Work()
        self.round, self.total_steps = number, total_steps
        if self.world.main and self._open is None:
            self._open = open_trackers(
                self.trackers, self.run.path, step=self.steps, run_id=self.run_id, options=self.options
            )
        if self._bar is not None:
            self._bar.close()
        self._bar = tqdm(
            total=total_steps,
            initial=self.step_of_round,
            disable=None if self.world.main else True,
            bar_format="{n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}",
            dynamic_ncols=True,
        )
        self._restart_clock()

    def step(self, metrics: Metrics, *, work: Work, learning_rate: float, epoch: float) -> None:
        """Take an optimizer step: its metrics, already over all processes, what it processed, its learning rate and
        the epochs done after it."""
        due = self.due
        self.step_of_round += 1
        self.num_tokens += work.tokens
        self.window_work += work
        self._work += work
        for name, value in metrics.items():
            entry = self.window.setdefault(name, [0.0, 0])
            if math.isfinite(value):
                entry[0] += value
                entry[1] += 1
        if due:
            means = {name: total / number if number else math.nan for name, (total, number) in self.window.items()}
            self._speeds = self._measure()
            self._write(
                {
                    **means,
                    "learning_rate": learning_rate,
                    "epoch": epoch,
                    "step": self.step_of_round,
                    "num_tokens": self.num_tokens,
                    "sharing": self.window_work.equivalent_tokens / self.window_work.tokens,
                    **self._speeds,
                }
            )
            self.window, self.window_work = {}, Work()
            self._restart_clock()
        self._latest.update(metrics)
        self._show(learning_rate, due=due)

    def report(self, metrics: Metrics) -> None:
        """Write a line of its own, such as that of an evaluation, at the step just done."""
        self._write({**metrics, "step": self.step_of_round})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time is not counted in the speeds: evaluating, saving."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, as JSON; what metrics.jsonl holds by now is then on the disk."""
        length = 0
        if self.world.main and self.path.exists():
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())
                length = file.tell()
        return {
            "round": self.round,
            "step": self.step_of_round,
            "steps_before": self.steps_before,
            "num_tokens": self.num_tokens,
            "window": {name: list(entry) for name, entry in self.window.items()},
            "work": vars(self.window_work),
            "metrics_bytes": length,
            "run_id": self.run_id,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`, before the first round is started; lines behind it are cut off metrics.jsonl. Raises
        InputError where that file is shorter than it was."""
        self.round, self.step_of_round = state["round"], state["step"]
        self.steps_before, self.num_tokens = state["steps_before"], state["num_tokens"]
        self.window = {name: list(entry) for name, entry in state["window"].items()}
        self.window_work, self.run_id = Work(**state["work"]), state["run_id"]
        if not self.world.main:
            return
        length = self.path.stat().st_size if self.path.exists() else 0
        if length < state["metrics_bytes"]:
            raise InputError(
                f"has {length} bytes, and {state['metrics_bytes']} when the checkpoint was made: it was changed or "
                "removed; put it back, or begin again in another --output",
                path=self.path,
            )
        if length > state["metrics_bytes"]:
            os.truncate(self.path, state["metrics_bytes"])

    def _write(self, line: Metrics) -> None:
        if self._open is None:
            return
        # JSON has no word for what is not finite
        self.run.log({"round": self.round, **{k: v if math.isfinite(v) else None for k, v in line.items()}})
        for tracker in self._open:
            tracker.log(line, self.steps)

    def _restart_clock(self) -> None:
        self._start, self._work = time.perf_counter(), Work()

    def _measure(self) -> dict[str, float]:
        seconds, work = time.perf_counter() - self._start, self._work
        speeds = {
            "tokens/s": work.tokens / seconds,
            "equivalent_tokens/s": work.equivalent_tokens / seconds,
            "pairs/s": work.pairs / seconds,
        }
        if self._peak is not None:
            speeds["mfu"] = work.flops / seconds / (self._peak * self.world.size)
        return {**speeds, "memory_gib": peak_memory(self.world.device) / 2**30}

    def _show(self, learning_rate: float, *, due: bool) -> None:
        assert self._bar is not None, "start_round comes before the first step"
        shown = {"loss {:.3f}": "loss", "margin {:.3f}": "rewards/margins", "acc {:.0%}": "rewards/accuracies"}
        parts = [text.format(self._latest[name]) for text, name in shown.items() if name in self._latest]
        parts.append(f"lr {learning_rate:.0e}")
        if self._speeds:
            computed, equivalent = (tqdm.format_sizeof(self._speeds[f"{k}tokens/s"]) for k in ("", "equivalent_"))
            parts.append(f"{computed} tok/s (={equivalent})")
            parts += [f"mfu {self._speeds['mfu']:.0%}"] if "mfu" in self._speeds else []
            parts.append(f"{self._speeds['memory_gib']:.1f}G")
        if self._bar.disable and self.world.main and due:  # a file, say, in which a bar would be noise
            tqdm.write(f"          step {self.step_of_round}/{self.total_steps} {' '.join(parts)}")
        self._bar.set_postfix_str(" ".join(parts), refresh=False)
        self._bar.update()


def eval_metrics(metrics: Metrics, *, seconds: float, pairs: int) -> dict[str, float]:
    """The metrics of an evaluation under TRL's names, `eval_loss`, `eval_rewards/chosen` and so on, from the same
    metrics without their prefix, already over all packs and processes; with the time it took."""
    found = {f"eval_{name}": value for name, value in metrics.items()}
    return {**found, "eval_seconds": seconds, "eval_pairs/s": pairs / seconds}


def repeatable(line: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a line of metrics.jsonl that are the same whenever a run is repeated."""
    return {name: value for name, value in line.items() if not name.endswith(UNREPEATABLE)}
