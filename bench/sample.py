"""Usable pairs of the sampler beside those of Hugging Face generation, from the same dialogues and the same model.

    python bench/sample.py [--cells NAME ...] [--rounds N] [--threads N] [--memory] [--json FILE]
    python bench/sample.py --device cuda [--json FILE]      # decoding rates instead: bench/decode_rate.py

A cell is a model, a length of prompts, and a workload (bench/prompts.py): dialogues with tools of their own, of which
no two prompts begin alike, or dialogues over one set of tools. The models are the embedded one at two sizes, which
answer alike (bench/widened.py). All sides run in one process and take turns, another one begins each round, and draws
differ from round to round. Every side gets the same decisions, limits and ends; its answers are scored, compared and
paired, with each other and with the gold answer, by the same code and on the clock.

- ttpa: this package, greedy trunk and forks, at most as many leaves as the peers draw answers
- ttpa, low: the same with lower floors, which find errors that the model makes less often
- generate: `generate(num_return_sequences=8)` at temperature 1, several prompts at once
- continuous: `generate_batch`, transformers' continuous batching, with its sharing of prompts
- slow twin: the trees of ttpa from plain forward passes, one path after the other

Decoded tokens count beginnings shared with a path that was written before once; computed tokens are all that went
through the model, prompts, padding and rejected drafts included. With `--memory` the peak of a fresh process for each
side: the highest resident set of one run above the one before.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose files have everyday names

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import ROOT, decode_rate, environment, report
from bench.measure import explain
from bench.memory import FORGET, _resident
from bench.prompts import Workload, make_prompts
from bench.samplers import SIDES, Setting, run
from bench.widened import EMBEDDED, QWEN_05B, Shape, widened
from ttpa.data.decisions import Decision
from ttpa.embedded import MODEL_DIR

PEERS = ("generate", "continuous")
FASTER, FEWER = 5.0, 5.0  # what we hold ourselves to: times the pairs a second of the better peer, and fewer tokens


@dataclass(frozen=True)
class Cell:
    """`dialogues` with prompts of `prompt` tokens, sampled `rounds` times by a model of `shape`."""

    shape: Shape
    prompt: int
    workload: Workload
    dialogues: int
    rounds: int


CELLS = {
    "embedded-512-own": Cell(EMBEDDED, 512, "own", dialogues=16, rounds=2),
    "embedded-512-shared": Cell(EMBEDDED, 512, "shared", dialogues=16, rounds=2),
    "embedded-2048-own": Cell(EMBEDDED, 2048, "own", dialogues=4, rounds=2),
    "embedded-2048-shared": Cell(EMBEDDED, 2048, "shared", dialogues=4, rounds=2),
    "0.5B-512-own": Cell(QWEN_05B, 512, "own", dialogues=8, rounds=1),
    "0.5B-2048-own": Cell(QWEN_05B, 2048, "own", dialogues=3, rounds=1),
}


def prepare(cell: Cell) -> tuple[Setting, list[Decision]]:
    """The models of a cell and its decisions."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    small: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    decisions = make_prompts(
        tokenizer, cell.dialogues, length=cell.prompt, workload=cell.workload, vocab_size=cell.shape.vocab_size
    )
    return Setting.of(widened(small, cell.shape), tokenizer), decisions


def warm_up(side: str, setting: Setting, decision: Decision) -> None:
    """Libraries and threads, on the end of a prompt and the beginning of an answer."""
    short = replace(decision, prompt_ids=decision.prompt_ids[-64:])
    run(SIDES[side], replace(setting, max_new_tokens=4), [short], seed=0)


def measure(
    setting: Setting, decisions: list[Decision], *, rounds: int
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Every side `rounds` times, in turns: per side the sums over its rounds, and the rounds themselves; and the peers
    that cannot run here, with their errors."""
    failed: dict[str, str] = {}
    for side in SIDES:
        try:
            warm_up(side, setting, decisions[0])
        except Exception as error:
            if side not in PEERS:
                raise
            failed[side] = explain(error)
    names = [side for side in SIDES if side not in failed]
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in names}
    for r in range(rounds):
        for side in names[r % len(names) :] + names[: r % len(names)]:
            start = time.perf_counter()
            outcome = run(SIDES[side], setting, decisions, seed=r)
            seconds = time.perf_counter() - start
            taken[side].append({"seconds": seconds, **asdict(outcome)})
    return {side: _summary(runs) for side, runs in taken.items()}, failed


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    total = {name: sum(run[name] for run in runs) for name in ("seconds", "pairs", "decoded", "computed", "passes")}
    return {
        **total,
        "pairs_per_second": total["pairs"] / total["seconds"],
        "tokens_per_pair": total["decoded"] / total["pairs"] if total["pairs"] else None,
        "rounds": runs,
    }


def compare(sides: dict[str, dict[str, Any]], ours: str = "ttpa") -> dict[str, float | None]:
    """How many times the usable pairs a second of the better peer ours are, and how many times fewer tokens a pair
    takes than at the more frugal peer; None where a side has no pair."""
    mine, peers = sides[ours], [sides[peer] for peer in PEERS if peer in sides]
    best = max((peer["pairs_per_second"] for peer in peers), default=None)
    frugal = min((peer["tokens_per_pair"] for peer in peers if peer["pairs"]), default=None)
    return {
        "faster": mine["pairs_per_second"] / best if best else None,
        "fewer_tokens": frugal / mine["tokens_per_pair"] if frugal and mine["pairs"] else None,
    }


def peak_bytes(cell: Cell, side: str) -> int:
    """Highest resident set of one run above the one before; to be called in a fresh process."""
    setting, decisions = prepare(cell)
    warm_up(side, setting, decisions[0])
    before = _resident("VmRSS")
    FORGET.write_text("5")  # the peak so far
    run(SIDES[side], setting, decisions, seed=0)
    return _resident("VmHWM") - before


def add_memory(name: str, sides: dict[str, dict[str, Any]], threads: int) -> None:
    """The peak of each side in a process of its own."""
    for side, entry in sides.items():
        command = [sys.executable, "bench/sample.py", "--cells", name, "--peak", side, "--threads", str(threads)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True, text=True)
        entry["peak_bytes"] = int(done.stdout.split()[-1])


HEADING = (
    f"{'cell':20} {'side':10} {'pairs':>6} {'pairs/s':>8} {'tokens/pair':>11} {'decoded':>8} {'tokens/s':>8} "
    f"{'computed':>9} {'passes':>7} {'seconds':>8} {'peak MB':>8}"
)


def table(name: str, sides: dict[str, dict[str, Any]], compared: dict[str, dict[str, float | None]]) -> str:
    """The rows of one cell, and how ours compares with the better peer."""
    rows = []
    for side, entry in sides.items():
        per_pair = f"{entry['tokens_per_pair']:.1f}" if entry["pairs"] else "-"
        peak = f"{entry['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in entry else "-"
        rows.append(
            f"{name:20} {side:10} {entry['pairs']:6} {entry['pairs_per_second']:8.3f} {per_pair:>11} "
            f"{entry['decoded']:8} {entry['decoded'] / entry['seconds']:8.1f} {entry['computed']:9} "
            f"{entry['passes']:7} {entry['seconds']:8.2f} {peak:>8}"
        )
    for side, values in compared.items():
        faster, fewer = (
            f"{x:.2f}" if x is not None else "not known" for x in (values["faster"], values["fewer_tokens"])
        )
        rows.append(
            f"{name:20} {side:10} pairs/s over the better peer: {faster} (>={FASTER:g}), tokens/pair below: {fewer} "
            f"(>={FEWER:g})"
        )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL", help=", ".join(CELLS))
    parser.add_argument("--rounds", type=int, help="of each side, instead of those of the cell")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--memory", action="store_true", help="run each side once more, in a fresh process")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, after every cell")
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak_bytes(CELLS[options.cells[0]], options.peak))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here (torch.cuda.is_available() is False): use --device cpu", file=sys.stderr)
        return 2
    command = ["python", "bench/sample.py", *(sys.argv[1:] if arguments is None else arguments)]
    record: dict[str, Any] = {**report.machine(torch.device(options.device)), "command": command, "cells": []}
    print(report.heading(record), "", sep="\n")

    def save(entry: dict[str, Any]) -> None:
        record["cells"].append(entry)
        if options.json:
            report.write_json(options.json, record)

    if options.device == "cuda":
        decode_rate.main(save)
        return 0
    print(HEADING)
    for name in options.cells:
        cell = CELLS[name]
        setting, decisions = prepare(cell)
        sides, failed = measure(setting, decisions, rounds=options.rounds or cell.rounds)
        del setting
        if options.memory:
            add_memory(name, sides, options.threads)
        compared = {side: compare(sides, side) for side in ("ttpa", "ttpa, low")}
        save({"cell": name, **asdict(cell), "sides": sides, "failed": failed, "compared": compared})
        print(table(name, sides, compared), flush=True)
        for side, reason in failed.items():
            print(f"{name:20} {side:10} failed: {reason.splitlines()[-1]}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
