"""Measure cases one after the other: `python -m bench.worker --out FILE --size SIZE OP ...`

FILE gets one JSON object a line, at once: `{"starting": [case, side]}` before each side and `{"case": record}` after
each case. A process that dies leaves word of what it died of. Started again with the same FILE it goes on behind what
is there, without the sides of lines `{"failed": [case, side, reason]}`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import Case, DeviceLost, answers, explain, measure
from bench.ops import OPS, SIZES, Size, cases
from bench.report import finite

LOST = 3  # exit status: the GPU is lost to this process


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without those that a killed process left half."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def append(path: Path, **line: Any) -> None:
    """Add a line to a log, behind whatever is there."""
    with path.open("a") as file:
        file.write("\n" + json.dumps(finite(line)) + "\n")


def note_start(path: Path, label: str, side: str) -> None:
    append(path, starting=[label, side])


def by_importance(ops: Sequence[str], size: Size) -> Iterator[Case]:
    """The first case of each operation, then the second, so that a time limit cuts off the least of it."""
    for turn in itertools.zip_longest(*(cases(op, size) for op in ops)):
        yield from (case for case in turn if case is not None)


def label(case: Case) -> str:
    return f"{case.op} {case.name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="+", choices=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, action="append", required=True, help="may be given several times")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=15, help="at most; at least 3")
    parser.add_argument("--case-seconds", type=float, default=3.0, help="for the timed rounds of a case")
    parser.add_argument("--seconds", type=float, default=1e9, help="no case begins after that")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, end = torch.device(options.device), time.perf_counter() + options.seconds
    earlier = read(options.out)
    done = {(line["case"]["size"], line["case"]["op"], line["case"]["case"]) for line in earlier if "case" in line}
    failed = [line["failed"] for line in earlier if "failed" in line]
    for size, case in [(s, c) for s in options.size for c in by_importance(options.ops, s)]:
        if (size, case.op, case.name) in done or time.perf_counter() > end:
            continue
        label = f"{case.op} {case.name}"
        try:
            record = measure(
                case,
                device,
                rounds=0 if size == "errors" else options.rounds,
                seconds=options.case_seconds,
                skip={side: reason for name, side, reason in failed if name == label},
                starting=functools.partial(note_start, options.out, label),
            )
        except DeviceLost as lost:
            append(options.out, failed=[label, lost.side, lost.reason])
            return LOST
        except Exception as error:  # of its inputs, its reference or its timed rounds
            record = {"op": case.op, "case": case.name, "sides": {}, "absent": {}}
            record["failed"] = {"the case as a whole": explain(error)}
        append(options.out, case=record | {"size": size})
        if not answers(device):
            return LOST
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
