"""TensorBoard and Weights & Biases beside metrics.jsonl."""

from __future__ import annotations

import importlib.util

import pytest

from ttpa.errors import InputError
from ttpa.training.monitor import Monitor, Work
from ttpa.training.run_folder import RunFolder
from ttpa.training.trackers import tracker_names

WORK = Work(pairs=4, tokens=100, equivalent_tokens=250)


def take(monitor, steps):
    for step in steps:
        monitor.step({"loss": 1 / step}, work=WORK, learning_rate=0.1, epoch=1)


def test_names_are_a_comma_list():
    assert tracker_names("none") == []
    assert tracker_names("tensorboard, tensorboard") == ["tensorboard"]


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="--report_to: there is no 'tensorbord'; did you mean tensorboard"):
        tracker_names("tensorbord")
    with pytest.raises(InputError, match="there are tensorboard, wandb"):
        tracker_names("x")


def test_what_is_not_installed_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--report_to wandb: it is not installed; pip install wandb"):
        Monitor(RunFolder(tmp_path), logging_steps=1, report_to="wandb")
    assert tracker_names("none") == []


def test_tensorboard_goes_on_at_the_right_step(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def monitor_of_run():
        return Monitor(RunFolder(tmp_path), logging_steps=1, report_to="tensorboard")

    with monitor_of_run() as monitor:
        monitor.start_round(1, total_steps=3)
        take(monitor, [1, 2, 3])
        monitor.start_round(2, total_steps=3)
        take(monitor, [4])
        monitor.report({"eval_loss": 0.5})
        state = monitor.state()
        monitor.step({"loss": 99.0}, work=WORK, learning_rate=0.1, epoch=1)  # lost with the process
    with monitor_of_run() as monitor:
        monitor.restore(state)
        monitor.start_round(2, total_steps=3)
        take(monitor, [5, 6])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(step, pytest.approx(1 / step)) for step in range(1, 7)]
    assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == [(4, 0.5)]


def test_weights_and_biases_resumes_the_same_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Monitor(RunFolder(tmp_path), logging_steps=1, report_to="wandb", options={"beta": 0.1}) as monitor:
        monitor.start_round(1, total_steps=4)
        take(monitor, [1])
        monitor.report({"eval_loss": 0.25})
        take(monitor, [2])
        first, state = wandb.run.id, monitor.state()
        assert wandb.run.config["beta"] == 0.1
        # a step is taken over when the next one begins
        assert (wandb.run.summary["train/loss"], wandb.run.summary["eval/loss"]) == (1.0, 0.25)
    assert wandb.run is None
    with Monitor(RunFolder(tmp_path), logging_steps=1, report_to="wandb") as monitor:
        monitor.restore(state)
        monitor.start_round(1, total_steps=4)
        take(monitor, [3, 4])
        assert (wandb.run.id, wandb.run.step) == (first, 4)
        assert wandb.run.summary["train/loss"] == pytest.approx(1 / 3)
