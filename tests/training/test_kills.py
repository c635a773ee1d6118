from __future__ import annotations

import os
import random
import signal
import time

import pytest
from kill_train import finish, kill_and_resume, outcome, start, unbroken, write_inputs

from ttpa.training.stop import STOPPED


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, options):
    """The outcome of an unbroken run, and the seconds it took."""
    folder = tmp_path_factory.mktemp("alone")
    return unbroken(folder / "run", *options, log=folder / "log")


def test_a_run_that_is_killed_again_and_again_ends_as_an_unbroken_one(tmp_path, options, alone):
    expected, seconds = alone
    log, rng = tmp_path / "log", random.Random(0)
    for found in kill_and_resume(tmp_path / "run", *options, kills=5, seconds=seconds, rng=rng, log=log):
        assert found == expected
    assert "\nresume " in log.read_text()


def test_a_run_that_is_told_to_stop_saves_and_goes_on_another_time(tmp_path, options, alone):
    checkpoints = tmp_path / "run" / "checkpoints"
    sparing = [*options, "--save_steps", 0]
    process = start(tmp_path / "run", *sparing)
    while process.is_alive() and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.001)  # until its first step is done
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == STOPPED
    (saved,) = checkpoints.iterdir()
    assert 1 <= int(saved.name.removeprefix("step-")) < 20
    assert finish(start(tmp_path / "run", *sparing)) == 0
    assert outcome(tmp_path / "run") == alone[0]
