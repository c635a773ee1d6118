"""Memory of one side on the CPU: `python -m bench.memory OP CASE SIDE`, one line of JSON.

A fresh process runs the side once on the smallest case, so that libraries and threads are there, makes the inputs,
and then measures one run: its highest resident set above the one before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, environment
from bench.measure import Case, Side, result_bytes
from bench.ops import OPS, SIZES, Size, cases

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_fresh_process(op: str, case: str, side: str, *, size: Size, threads: int) -> dict[str, int]:
    """Bytes at the peak above the inputs, and how many of them are results. Raises RuntimeError with the output."""
    command = [sys.executable, "-m", "bench.memory", op, case, side, "--size", size, "--threads", str(threads)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-5:]))
    return json.loads(done.stdout.splitlines()[-1])


def add(record: dict[str, Any], size: Size, threads: int) -> None:
    """The memory of each side to a record, or why it failed."""
    for side, entry in record["sides"].items():
        try:
            entry |= in_fresh_process(record["op"], record["case"], side, size=size, threads=threads)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            record["failed"][f"memory of {side}"] = str(error)


def measure(case: Case, side: str, small: Case) -> dict[str, int]:
    """One run of a side, in the process that calls this."""
    device = torch.device("cpu")
    small.sides[side].build(small.inputs(device))()
    competitor: Side = case.sides[side]
    run = competitor.build(case.inputs(device))
    before = _resident("VmRSS")
    FORGET.write_text("5")  # the peak so far
    results = run()
    return {"peak_bytes": _resident("VmHWM") - before, "result_bytes": result_bytes(results)}


def available() -> bool:
    """Whether the system tells what is needed (Linux does)."""
    return STATUS.exists() and FORGET.exists()


def _resident(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=OPS)
    parser.add_argument("case")
    parser.add_argument("side")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    by_name = {case.name: case for case in cases(options.op, options.size)}
    small = cases(options.op, "toy")[0]
    print(json.dumps(measure(by_name[options.case], options.side, small)))


if __name__ == "__main__":
    main()
