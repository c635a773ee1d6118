"""The head, forward and backward, against every peer that can run here.

    python bench/linear_logp.py --device cpu            # R 2048, V 32000, H 512 in fp32
    python bench/linear_logp.py --device cuda --json F  # the shapes of large models in bf16

Log-probabilities with a trainable, a frozen and no gradient, and the preference loss where 60 % of the rows have no
coefficient: medians of calls in turns, memory above the inputs, errors of results and gradients against fp64, and
plain matrix products of the same shapes in the same turns. On a CPU the memory of each side is that of a fresh process.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose files have everyday names

import torch

from bench import memory, report
from bench.measure import measure
from bench.ops import SIZES, Size, cases

OPS = ("linear_logp", "linear_token_dpo")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--json", type=Path, help="write the numbers to this file, and the tables beside it as .md")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each side, at least 3")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="on a CPU: a fresh process for each side"
    )
    parser.add_argument("--size", choices=SIZES, action="append", help="default: that of the device")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here (torch.cuda.is_available() is False): use --device cpu", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    sizes: list[Size] = options.size or (["cpu"] if options.device == "cpu" else ["gpu", "errors"])
    machine = report.machine(device)
    print(report.heading(machine), "", report.LEGEND, sep="\n")
    records: list[dict[str, Any]] = []
    for size, case in [(s, c) for s in sizes for op in OPS for c in cases(op, s)]:
        if options.only not in case.name:
            continue
        rounds = 0 if size == "errors" else options.rounds
        record = measure(case, device, rounds=rounds, seconds=float("inf")) | {"size": size}
        if options.memory and options.device == "cpu" and memory.available():
            memory.add(record, size, options.threads)
        records.append(record)
        print(report.table(record), flush=True)
        if options.json:
            report.write_json(options.json, machine | {"cases": records})
            tables = [report.table(record) for record in records]
            report.write(
                options.json.with_suffix(".md"), "\n".join([report.heading(machine), "", report.LEGEND, *tables])
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
