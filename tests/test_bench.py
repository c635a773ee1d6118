"""The benchmarks as commands: the whole plan for a GPU, and what it makes of failures."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from bench import ROOT, environment, gpu, report, step_sides, train_step
from bench.ops import OPS
from bench.worker import append, read

CPU = torch.device("cpu")


def test_a_log_that_breaks_off_is_read_up_to_there(tmp_path):
    log = tmp_path / "log.jsonl"
    assert read(log) == []
    log.write_text('{"a": 1}\n{"b": 2}\n{"c"')
    assert read(log) == [{"a": 1}, {"b": 2}]
    append(log, d=[math.nan])
    assert read(log) == [{"a": 1}, {"b": 2}, {"d": ["nan"]}]


def test_outcomes_of_tests_include_what_was_running_at_the_end():
    lines = [
        {"test": "a", "outcome": "started"},
        {"test": "a", "outcome": "passed", "seconds": 2.0, "tail": ""},
        {"test": "b", "outcome": "started"},
        {"test": "b", "outcome": "failed", "seconds": 1.0, "tail": "assert 1 == 2"},
        {"test": "c", "outcome": "started"},
    ]
    found = gpu.outcomes(lines)
    assert found["counts"] == {"passed": 1, "failed": 1, "started": 1}
    assert found["failed"] == {"b": "assert 1 == 2"} and found["unfinished"] == ["c"]
    assert found["slowest"] == {"a": 2.0, "b": 1.0}


@pytest.fixture
def session(tmp_path):
    record = {**report.machine(CPU), "command": [], "parts": {}}
    return gpu.Session(tmp_path / "out", tmp_path, True, record)


def test_a_side_that_ends_its_process_is_left_out_of_the_next_one(session, monkeypatch):
    log, calls = session.work / "cases.jsonl", []

    def run(name, command, *, seconds, progress):
        calls.append(seconds)
        session.record["parts"]["cases"] = {"tail": "Segmentation fault", "exit": -11, "commands": []}
        with log.open("a") as file:
            if len(calls) == 1:
                print('{"starting": ["op case", "cce"]}', file=file)
                return -11
        return 0

    monkeypatch.setattr(session, "run", run)
    gpu.run_cases(session, seconds=100)
    assert len(calls) == 2 and calls[1] <= calls[0]
    assert read(log)[-1] == {"failed": ["op case", "cce", "ended its process: Segmentation fault"]}


def test_a_part_that_takes_too_long_is_stopped_and_what_it_said_is_kept(session):
    seen = []
    command = ["-c", "import time; print('here', flush=True); time.sleep(60)"]
    session.run("slow", command, seconds=1.5, progress=lambda: seen.append(1))
    part = session.record["parts"]["slow"]
    assert part["exit"] == "stopped after 2 s" and part["tail"] == "here" and part["seconds"] < 10 and seen
    assert json.loads((session.folder / "gpu.json").read_text())["parts"]["slow"] == part
    assert "| slow | " in (session.folder / "gpu.md").read_text()


def test_a_failing_test_is_reported_with_its_end(tmp_path):
    (tmp_path / "test_a.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    (tmp_path / "test_b.py").write_text("import nothing_of_that_name\n")
    log = tmp_path / "log.jsonl"
    command = ["-m", "pytest", "-p", "bench.pytest_log", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    child = {**environment(), "TTPA_TEST_LOG": str(log), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(
        [sys.executable, *command, "-c", os.devnull, str(tmp_path)], cwd=ROOT, env=child, capture_output=True
    )
    found = gpu.outcomes(read(log))
    assert found["counts"] == {"passed": 1, "failed": 2}
    (bad,) = [tail for test, tail in found["failed"].items() if test.endswith("test_bad")]
    assert "assert 1 == 2" in bad and any("nothing_of_that_name" in tail for tail in found["failed"].values())


def test_a_module_that_cannot_be_imported_is_named_with_the_reason():
    assert gpu.import_error("ttpa_kernels") is None
    assert gpu.import_error("no_such_module") == "import no_such_module: No module named 'no_such_module'"


def test_our_failures_are_problems_and_those_of_peers_are_not():
    wrong = {"errors": {"loss": {"rms": "nan", "max": "nan"}}}
    failed = {"cce": "x", "ttpa-torch": "y", "the case as a whole": "z"}
    cases = [{"op": "op", "case": "c", "failed": failed, "sides": {"ttpa": wrong, "trl": wrong}}]
    parts = {"tests": {"exit": 1}, "cases": {"exit": 0}, "sample": {"absent": "no such file"}}
    tests = {"failed": {"test_a": "tail"}, "unfinished": ["test_b"]}
    assert gpu.problems({"parts": parts, "tests": tests, "cases": cases}) == [
        "tests: exit 1",
        "test test_a",
        "test test_b",
        "op c: ttpa-torch",
        "op c: the case as a whole",
        "op c: ttpa",
    ]
    assert "loss nan" in report.table({**cases[0], "absent": {}})


def test_without_a_gpu_nothing_is_measured_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "There is no GPU here" in capsys.readouterr().err


def test_the_whole_plan_runs_on_the_cpu(tmp_path):
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["parts"]["tests"]["exit"] == 0 and record["parts"]["cases"]["exit"] == 0
    assert record["tests"]["counts"]["passed"] > 0 and not record["tests"]["failed"]
    assert {case["op"] for case in record["cases"]} == set(OPS)
    for case in record["cases"]:
        assert not case["failed"], case["failed"]
        assert all(case["absent"].values())
        assert "ttpa" in case["sides"] and all(side["median"] > 0 for side in case["sides"].values())
        for side, entry in case["sides"].items():
            for name, error in entry.get("errors", {}).items():
                assert max(error.values()) < 1e-5, (case["case"], side, name)
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"### {op}: " in text for op in OPS)
    for script in gpu.SCRIPTS:
        reason = gpu.absence(script)
        assert reason is None or f"absent: {reason}" in text


def test_pytest_benchmark_gets_the_times_that_were_measured_in_turns(tmp_path):
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "out.json"
    command = ["-m", "pytest", "bench", "-k", "token_dpo-R32-P2-eager", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, *command, f"--benchmark-json={out}"],
        cwd=ROOT,
        env={**environment(), "TTPA_BENCH_SIZE": "toy"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    benchmarks = json.loads(out.read_text())["benchmarks"]
    assert len(benchmarks) == 3
    for benchmark in benchmarks:
        assert benchmark["stats"]["median"] == pytest.approx(benchmark["extra_info"]["median"], rel=1e-6)
        assert benchmark["stats"]["rounds"] >= 3


def test_both_trainers_take_the_same_steps_and_their_memory_is_measured(tmp_path, monkeypatch, capsys):
    out = tmp_path / "step.json"
    sides_of = step_sides.sides_of
    fewer = ("trl-cached by 1", "ttpa")  # each side is a process of its own
    monkeypatch.setattr(train_step, "sides_of", lambda case: {side: sides_of(case)[side] for side in fewer})
    command = f"train_step.py --toy --rounds 1 --threads 1 --case 1024-64-1:1 --json {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    train_step.main()
    (case,) = json.loads(out.read_text())["cases"].values()
    assert set(case["sides"]) == set(fewer)
    for side in case["sides"].values():
        assert side["peak_bytes"] > 10**6 and side["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
        assert side["losses"][1] < 0.692
    assert f"ttpa over {fewer[0]}: {case['faster']:.2f}x" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["1.5B-full", "7B-lora"])
def test_the_cases_for_a_gpu_run_at_toy_size_on_the_cpu(name):
    case = train_step.toy(train_step.CASES["cuda"][name])
    sides = {
        side: train_step.measure({side: make(CPU)}, case, rounds=1, device=CPU)[side]
        for side, make in step_sides.sides_of(case).items()
    }
    assert sides["trl"]["reference_seconds"] == 0 < sides["trl-cached"]["reference_seconds"]
    assert (
        "ttpa over trl"
        in train_step.lines(name, case, with_memory(sides), train_step.summary(case, with_memory(sides)))[-1]
    )


def with_memory(sides):
    return {side: {**numbers, "peak_bytes": 10**9} for side, numbers in sides.items()}


def test_sides_that_disagree_about_a_loss_are_no_result():
    case = train_step.CASES["cpu"]["512-48-1:4"]
    sides = {
        name: {"losses": [0.69, 0.5], "pairs_per_second": 1, "pairs_per_second_one_epoch": 1, "peak_bytes": 1}
        for name in ("trl", "ttpa")
    }
    assert train_step.summary(case, sides)["faster"] == 1
    sides["trl"]["losses"] = [0.69, 0.51]
    with pytest.raises(RuntimeError, match="disagree"):
        train_step.summary(case, sides)


def test_a_side_without_room_is_reported_and_the_others_are_compared():
    case = train_step.CASES["cuda"]["7B-full"]
    side = {
        "losses": [0.69, 0.5],
        "pairs_per_second": 1.0,
        "pairs_per_second_one_epoch": 0.5,
        "peak_bytes": 4 * 10**9,
        "reference_seconds": 2.0,
    }
    sides = {
        "trl": {"out_of_memory": True},
        "trl checkpointing": side,
        "ttpa": {**side, "pairs_per_second": 8.0, "mfu": 0.45},
    }
    ratios = train_step.summary(case, sides)
    assert ratios["peer"] == "trl checkpointing" and ratios["faster"] == 8.0
    shown = "\n".join(train_step.lines("7B-full", case, sides, ratios))
    assert "out of memory" in shown and "45.0%" in shown and "8.00x" in shown
    assert train_step.summary(case, {"trl": {"out_of_memory": True}, "ttpa": side}) == {}


def test_without_its_peer_the_training_step_is_absent_with_the_reason(monkeypatch):
    assert gpu.absence("bench/train_step.py") is None
    monkeypatch.setitem(gpu.NEEDS, "bench/train_step.py", ("no_such_module",))
    assert gpu.absence("bench/train_step.py") == "import no_such_module: No module named 'no_such_module'"


def test_every_test_that_needs_a_gpu_is_in_the_plan():
    marked = {file for file in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in file.read_text()}
    marked -= {ROOT / "tests" / "test_bench.py"}
    named = [ROOT / name for name in [*gpu.TESTS, *gpu.WITH_TTPA] if name.startswith("tests/")]
    assert marked and all(any(file.is_relative_to(path) for path in named) for file in marked)
