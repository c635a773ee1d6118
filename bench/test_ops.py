"""The microbenchmarks as pytest-benchmark shows, stores and compares them: `pytest bench -rs`

The sides of a case are measured together, in turns, before the first of them is reported; pytest-benchmark gets the
times of that run. Cases are those of the GPU where there is one; TTPA_BENCH_SIZE names another size. Sides that are
absent are skipped with the reason. `--benchmark-json FILE` keeps the numbers, with memory and errors as extra info.
"""

from __future__ import annotations

import os
from typing import Any, cast

import pytest
import torch

from bench.measure import Case, measure
from bench.ops import OPS, SIZES, Size, cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = cast(Size, os.environ.get("TTPA_BENCH_SIZE", "gpu" if DEVICE.type == "cuda" else "cpu"))
ROUNDS, SECONDS = 15, 8.0
if SIZE not in SIZES:
    raise pytest.UsageError(f"TTPA_BENCH_SIZE is {SIZE!r}, not one of {', '.join(SIZES)}")
CASES = [case for op in OPS for case in cases(op, SIZE)]


class Replay:
    """A clock that stands still but for the times that were measured before."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Replay()


@pytest.fixture(scope="module")
def records() -> dict[str, dict[str, Any]]:
    """What was measured, by operation and case."""
    return {}


@pytest.mark.parametrize(
    ("case", "side"),
    [
        pytest.param(
            case, side, id=f"{case.op}-{case.name}-{side}", marks=pytest.mark.benchmark(group=f"{case.op} {case.name}")
        )
        for case in CASES
        for side in case.sides
    ],
)
@pytest.mark.benchmark(timer=CLOCK)
def test_side(benchmark: Any, records: dict[str, dict[str, Any]], case: Case, side: str) -> None:
    key = f"{case.op} {case.name}"
    if key not in records:
        records[key] = measure(case, DEVICE, rounds=ROUNDS, seconds=SECONDS)
    record = records[key]
    if side in record["absent"]:
        pytest.skip(f"{side} is absent: {record['absent'][side]}")
    assert side not in record["failed"], record["failed"][side]
    entry = record["sides"][side]
    benchmark.extra_info.update({name: value for name, value in entry.items() if name != "seconds"})
    seconds = iter(entry["seconds"])

    def again() -> None:
        CLOCK.now += next(seconds)

    benchmark.pedantic(again, rounds=len(entry["seconds"]))
