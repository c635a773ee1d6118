"""That the benchmarks measure what they say."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bench import linear_logp, memory, report
from bench.measure import Absent, Case, Side, errors, gpu_memory, interleave, measure, spread
from bench.ops import cases

CPU = torch.device("cpu")


def test_calls_take_turns_and_another_begins_each_round():
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    taken = interleave(runs, CPU, rounds=4, seconds=100)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 4, "b": 4, "c": 4}


def test_three_rounds_are_run_however_little_time_there_is():
    assert len(interleave({"a": lambda: None}, CPU, rounds=50, seconds=0)["a"]) == 3


def test_a_gpu_is_timed_by_its_events_behind_writes_that_empty_its_cache(monkeypatch):
    log: list[str] = []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 2000.0  # milliseconds

    class Cache:
        def zero_(self):
            log.append("write")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: Cache())
    taken = interleave({"a": lambda: log.append("run")}, torch.device("cuda"), rounds=3, seconds=9)
    assert taken == {"a": [2.0, 2.0, 2.0]}
    assert log == 3 * (["write"] * 4 + ["record", "run", "record", "wait"])


def test_memory_of_a_gpu_is_counted_above_what_was_there(monkeypatch):
    allocated = {"now": 100, "most": 900}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: allocated.update(most=allocated["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated["most"])

    def run():
        allocated.update(now=112, most=700)
        return {"dhidden": torch.zeros(3)}

    assert gpu_memory(run, torch.device("cuda")) == {"peak_bytes": 600, "result_bytes": 12}


def test_spread_keeps_median_quartiles_and_extremes():
    found = spread([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (found["median"], found["quartiles"], found["extremes"]) == (3.0, [2.0, 4.0], [1.0, 100.0])


def test_errors_are_rms_for_values_and_relative_norms_for_gradients():
    results = {"logp": torch.tensor([1.0, 3.0]), "dhidden": torch.tensor([3.0, 5.0]), "only here": torch.zeros(1)}
    truth = {"logp": torch.tensor([1.0, 2.0]).double(), "dhidden": torch.tensor([3.0, 4.0]).double()}
    found = errors(results, truth)
    assert found == {"logp": {"rms": math.sqrt(0.5), "max": 1.0}, "dhidden": {"relative": pytest.approx(0.2)}}


def make_case(sides, **options) -> Case:
    return Case("op", "case", lambda device: 1.0, {name: Side(build) for name, build in sides.items()}, **options)


def test_a_side_that_fails_or_is_absent_is_listed_with_the_reason_and_the_others_are_measured():
    def missing(inputs):
        raise Absent("not installed")

    def broken(inputs):
        def run():
            raise RuntimeError("no kernel image")

        return run

    def good(inputs):
        return lambda: {"loss": torch.tensor(inputs)}

    case = make_case(
        {"missing": missing, "broken": broken, "good": good, "killer": good},
        reference=lambda inputs: {"loss": torch.tensor(1.5, dtype=torch.float64)},
    )
    started: list[str] = []
    record = measure(case, CPU, rounds=3, seconds=1, skip={"killer": "segmentation fault"}, starting=started.append)
    assert started == ["missing", "broken", "good"]
    assert record["absent"] == {"missing": "not installed"}
    assert record["failed"]["killer"] == "segmentation fault"
    assert record["failed"]["broken"].endswith("RuntimeError: no kernel image")
    assert list(record["sides"]) == ["good"]
    assert record["sides"]["good"]["errors"]["loss"]["rms"] == 0.5 and len(record["sides"]["good"]["seconds"]) == 3
    text = report.table({**record, "size": "toy"})
    assert "- missing: absent: not installed" in text and "- broken: FAILED: RuntimeError: no kernel image" in text


def test_times_stand_beside_those_of_the_plain_products(monkeypatch):
    seconds = {"product forward": 1.0, "product dhidden": 3.0, "product dweight": 9.0, "ttpa": 6.0}
    monkeypatch.setattr("bench.measure.interleave", lambda runs, *_, **__: {name: [seconds[name]] * 3 for name in runs})
    names = ("forward", "dhidden", "dweight")
    case = Case(
        "op",
        "case",
        lambda device: None,
        {"ttpa": Side(lambda inputs: dict, units=1.5)},
        products=lambda inputs: dict.fromkeys(names, dict),
        minimum=("forward", "dhidden"),
        share=0.5,
        operations=4e12,
    )
    record = measure(case, CPU, rounds=3, seconds=1)
    side = record["sides"]["ttpa"]
    assert side["of_minimum"] == 6.0 / (0.5 * (1.0 + 3.0))
    assert side["of_units"] == 6.0 / (1.5 * 2.0)
    assert side["tflops"] == 4 / 6 and record["products_tflops"] == 4 / (0.5 * 4)


@pytest.mark.skipif(not memory.available(), reason="the system does not tell the peak of a process")
def test_memory_of_the_cpu_is_that_of_the_logits_and_their_logarithms():
    case = cases("linear_logp", "cpu")[-1]
    assert case.name.endswith("no-grad")
    found = memory.in_fresh_process("linear_logp", case.name, "eager", size="cpu", threads=1)
    logits = 4 * 2048 * 32000
    assert 2 * logits < found["peak_bytes"] < 2.2 * logits
    assert found["result_bytes"] == 4 * 2048


def test_numbers_that_json_cannot_hold_are_written_as_text(tmp_path):
    report.write_json(tmp_path / "a.json", {"x": [float("nan"), 1.5, -math.inf]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": ["nan", 1.5, "-inf"]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_comparison_of_heads_prints_and_writes_its_tables(tmp_path, capsys):
    out = tmp_path / "out.json"
    sizes = ["--size", "toy", "--only", "no-grad", "--no-memory", "--rounds", "3", "--threads", "1"]
    assert linear_logp.main(["--device", "cpu", "--json", str(out), *sizes]) == 0
    (case,) = json.loads(out.read_text())["cases"]
    assert case["op"] == "linear_logp" and case["sides"]["ttpa"]["units"] == 1
    assert case["sides"]["ttpa"]["errors"]["logp"]["rms"] < 1e-6
    table = report.table(case)
    assert "| ttpa | " in table and table in capsys.readouterr().out and table in out.with_suffix(".md").read_text()
