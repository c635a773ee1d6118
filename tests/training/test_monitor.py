"""What a run tells of itself: metrics.jsonl, the bar, and the state that a resumed run goes on from."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest
import torch

from ttpa.errors import InputError
from ttpa.training.monitor import Monitor, Work, eval_metrics, repeatable
from ttpa.training.run_folder import RunFolder
from ttpa.world import World

WORK = Work(pairs=4, tokens=100, equivalent_tokens=250, flops=1e9)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics_of(step):
    """Loss and margin at every step, an accuracy at some."""
    values = {"loss": 1 / 3 + 1 / step, "rewards/margins": step / 7}
    return values | ({"rewards/accuracies": step / 11} if step % 2 == 0 else {})


def take(monitor, steps):
    for step in steps:
        work = Work(pairs=4, tokens=100, equivalent_tokens=250 + step, flops=1e9)
        monitor.step(metrics_of(step), work=work, learning_rate=0.1 / step, epoch=step / 10)


def test_a_line_holds_means_since_the_line_before(tmp_path):
    with Monitor(RunFolder(tmp_path), logging_steps=3) as monitor:
        monitor.start_round(1, total_steps=8)
        due = []
        for step in range(1, 9):
            due.append(monitor.due)
            take(monitor, [step])
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 3, 6, 8] == [i for i, is_due in enumerate(due, start=1) if is_due]
    for line, steps in zip(found, ([1], [2, 3], [4, 5, 6], [7, 8]), strict=True):
        for name in ("loss", "rewards/margins", "rewards/accuracies"):
            values = [metrics_of(step)[name] for step in steps if name in metrics_of(step)]
            assert line.get(name) == (pytest.approx(sum(values) / len(values)) if values else None)
        last = steps[-1]
        assert (line["round"], line["learning_rate"], line["epoch"]) == (1, 0.1 / last, last / 10)
        assert (line["num_tokens"], line["sharing"]) == (100 * last, pytest.approx(2.5 + sum(steps) / len(steps) / 100))


def test_speeds_count_what_was_computed_and_what_it_stands_for(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with Monitor(RunFolder(tmp_path), logging_steps=2) as monitor:
        monitor.start_round(1, total_steps=4)
        for _ in range(4):
            now[0] += 2.0
            monitor.step({}, work=WORK, learning_rate=0.1, epoch=1)
            with monitor.paused():
                now[0] += 100.0
    for line in lines(tmp_path):
        assert (line["tokens/s"], line["equivalent_tokens/s"], line["pairs/s"]) == (50, 125, 2)
        assert 0 < line["memory_gib"] < 1000 and "mfu" not in line, "a CPU has no peak rate to compare with"
        assert not {"tokens/s", "pairs/s", "memory_gib"} & repeatable(line).keys() and "step" in repeatable(line)


def test_mfu_is_the_share_of_the_peak_rate_of_all_gpus(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 3 << 30)
    world = World(0, 2, torch.device("cuda", 0))
    with Monitor(RunFolder(tmp_path), logging_steps=1, world=world) as monitor:
        monitor.start_round(1, total_steps=1)
        now[0] += 2.0
        monitor.step({}, work=Work(1, 1, 1, flops=2 * 989e12), learning_rate=0.1, epoch=1)
    (line,) = lines(tmp_path)
    assert (line["mfu"], line["memory_gib"]) == (pytest.approx(0.5), 3)


def test_values_that_are_not_finite_stay_out_of_the_means(tmp_path):
    with Monitor(RunFolder(tmp_path), logging_steps=3) as monitor:
        monitor.start_round(1, total_steps=3)
        for loss in (math.nan, 1.0, math.inf):
            monitor.step({"loss": loss}, work=WORK, learning_rate=0.1, epoch=1)
    assert [line["loss"] for line in lines(tmp_path)] == [None, 1.0]


@pytest.mark.parametrize("stop", [0, 1, 2, 4, 7, 10])
def test_a_resumed_run_writes_the_lines_of_an_unbroken_one(tmp_path, stop):
    """Two rounds of five steps; the run is killed three steps after its checkpoint, in the middle of a line."""

    def go(monitor, first, last):
        for step in range(first + 1, last + 1):
            if step in (1, 6) or step == first + 1:
                monitor.start_round(1 + step // 6, total_steps=5)
            take(monitor, [step])
            if step % 5 == 4:
                monitor.report({"eval_loss": 1 / step})

    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    with Monitor(whole, logging_steps=3) as monitor:
        go(monitor, 0, 10)
    with Monitor(broken, logging_steps=3) as monitor:
        go(monitor, 0, stop)
        state = json.loads(json.dumps(monitor.state()))
        go(monitor, stop, min(stop + 3, 10))
    with open(broken.path / "metrics.jsonl", "a") as file:
        file.write('{"round": 1, "lo')
    with Monitor(broken, logging_steps=3) as monitor:
        monitor.restore(state)
        assert monitor.steps == stop
        go(monitor, stop, 10)
    assert list(map(repeatable, lines(broken.path))) == list(map(repeatable, lines(whole.path)))


def test_a_file_that_lost_lines_is_refused(tmp_path):
    with Monitor(RunFolder(tmp_path), logging_steps=1) as monitor:
        monitor.start_round(1, total_steps=2)
        take(monitor, [1])
        state = monitor.state()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl: has 3 bytes, and \d+ when"):
        Monitor(RunFolder(tmp_path), logging_steps=1).restore(state)


def test_only_process_0_writes_and_all_count(tmp_path):
    run = RunFolder(tmp_path)
    with Monitor(run, logging_steps=2, world=World(1, 2)) as monitor:
        monitor.start_round(1, total_steps=3)
        take(monitor, [1, 2])
        assert (monitor.steps, monitor.due, monitor.state()["metrics_bytes"]) == (2, True, 0)
        monitor.restore({**monitor.state(), "metrics_bytes": 99})
    assert not list(tmp_path.iterdir())


def test_metrics_of_an_evaluation_have_the_names_of_trl():
    found = eval_metrics({"loss": 0.5, "rewards/chosen": 1.0}, seconds=4.0, pairs=10)
    assert found == {"eval_loss": 0.5, "eval_rewards/chosen": 1.0, "eval_seconds": 4.0, "eval_pairs/s": 2.5}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_what_matters_in_a_line_of_100_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Monitor(RunFolder(tmp_path), logging_steps=1) as monitor:
        monitor.start_round(1, total_steps=1200)
        monitor.step(
            {"loss": 0.51234, "rewards/margins": 0.2345, "rewards/accuracies": 0.875},
            work=Work(32, 40_000, 160_000),
            learning_rate=4e-7,
            epoch=0.1,
        )
        monitor.step({"loss": 0.4}, work=Work(32, 40_000, 160_000), learning_rate=4e-7, epoch=0.1)
        shown = str(monitor._bar)
    for part in ("2/1200", "loss 0.400", "margin 0.234", "acc 88%", "lr 4e-07", "tok/s (="):
        assert part in shown
    assert len(shown) <= 100 and shown.endswith("G")
    assert "2/1200" in terminal.getvalue()


def test_nothing_is_shown_outside_of_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", other := io.StringIO())
    with Monitor(RunFolder(tmp_path), logging_steps=1) as monitor:
        monitor.start_round(1, total_steps=2)
        take(monitor, [1, 2])
    assert other.getvalue() == ""


def test_an_exception_closes_everything_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    closed = []

    class Broken:
        def log(self, metrics, step):
            pass

        def close(self, *, failed):
            closed.append(failed)
            raise OSError("no space")

    with pytest.raises(OSError, match="no space") as caught, Monitor(RunFolder(tmp_path), logging_steps=1) as monitor:
        monitor.start_round(1, total_steps=2)
        monitor._open = [Broken(), Broken()]
        bar = monitor._bar
        assert not bar.disable
        raise KeyboardInterrupt
    assert closed == [True, True] and bar.disable and isinstance(caught.value.__context__, BaseException)
