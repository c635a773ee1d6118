"""The whole GPU side in one command and under 9 minutes: `python -m bench.gpu`

Runs the tests of the kernels, all microbenchmarks against all peers, the errors against fp64, and the benchmarks of the
training step and of the sampler. Each part has a time limit, and what is known is written down at once: to gpu.json and
gpu.md in the output folder, bench/results/<device>/. It needs torch, triton, transformers, numpy and pytest, and no
installation; peers that are not installed are listed with the reason.

Exits with 1 where a test, one of our sides or a part as a whole went wrong; without a GPU it says so and exits with 2.
 `--dry-run` goes through the plan on the CPU, at toy sizes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, environment, report
from bench.ops import OPS
from bench.worker import append, read

TOTAL_SECONDS = 525
TEST_SECONDS = 150
SCRIPTS = {"bench/train_step.py": 150, "bench/sample.py": 50}  # seconds at most
NEEDS = {"bench/train_step.py": ("trl", "peft")}  # packages without which there is nothing to compare with
RESTARTS = 5  # of the microbenchmarks, after sides that took their process with them
POLL_SECONDS = 1.0
TAIL = 15  # lines of a part's output that are kept
TESTS = ["-m", "(gpu or triton) and not ahead", "--continue-on-collection-errors", "tests/kernels"]
WITH_TTPA = [
    "tests/test_model.py",
    "tests/sampling/test_head.py",
    "tests/training/test_checkpoint.py",
    "tests/training/test_lora.py",
]
WITHOUT_TTPA = ["--confcutdir=tests/kernels"]  # the tests of the kernels need only torch and triton, but for some
DRY_TESTS = ["tests/test_bench_inputs.py", "--noconftest"]


@dataclass
class Session:
    """One run of everything: what is known so far, where it is written, and a folder for what comes before that."""

    folder: Path
    work: Path
    dry: bool
    record: dict[str, Any]
    deadline: float = field(default_factory=lambda: time.monotonic() + TOTAL_SECONDS)

    def save(self) -> None:
        report.write_json(self.folder / "gpu.json", self.record)
        report.write(self.folder / "gpu.md", markdown(self.record))

    def run(self, name: str, command: list[str], *, seconds: float, progress: Callable[[], None] | None = None) -> int:
        """Run a command of a part for so long at most, calling `progress` now and then; its exit status, -9 if killed.

        Its output goes to a file, of which the record keeps the end.
        """
        part = self.record["parts"].setdefault(name, {"commands": [], "seconds": 0.0})
        part["exit"] = "still running"
        part["commands"].append(shlex.join(["python", *command]))
        seconds, began = max(0.0, min(seconds, self.deadline - time.monotonic())), time.monotonic()
        log = self.work / f"{name}.log"
        with log.open("a") as output:
            child = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=self.environment(), stdout=output, stderr=subprocess.STDOUT
            )
            try:
                while child.poll() is None and time.monotonic() - began < seconds:
                    try:
                        child.wait(timeout=min(POLL_SECONDS, max(0.0, began + seconds - time.monotonic())))
                    except subprocess.TimeoutExpired:
                        if progress is not None:
                            progress()
            finally:
                stopped = child.poll() is None
                if stopped:
                    child.kill()
                status = child.wait()
        part["seconds"] = round(part["seconds"] + time.monotonic() - began, 1)
        part["exit"] = f"stopped after {seconds:.0f} s" if stopped else status
        part["tail"] = "\n".join(log.read_text(errors="replace").strip().splitlines()[-TAIL:])
        if progress is not None:
            progress()
        self.save()
        return status

    def environment(self) -> dict[str, str]:
        """Tests write to a log of ours, and whatever plugins of pytest there are stay out."""
        log = str(self.work / "tests.jsonl")
        return {**environment(), "TTPA_TEST_LOG": log, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def run_tests(session: Session) -> None:
    """The tests that need a GPU or run on one."""
    log = session.work / "tests.jsonl"

    def progress() -> None:
        session.record["tests"] = outcomes(read(log))
        session.save()

    missing = import_error("ttpa")
    if missing:
        session.record["parts"]["tests of ttpa"] = {"absent": missing}
    plugins = ["-p", "bench.pytest_log", "-p", "no:cacheprovider"]
    tests = DRY_TESTS if session.dry else [*TESTS, *(WITHOUT_TTPA if missing else WITH_TTPA)]
    session.run("tests", ["-m", "pytest", *plugins, *tests], seconds=TEST_SECONDS, progress=progress)


def import_error(module: str) -> str | None:
    """Why a module cannot be imported, None where it can."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"import {module}: {error}"
    return None


def outcomes(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, the failures, and what was running at the end."""
    last = {line["test"]: line for line in lines}
    counts = Counter(line["outcome"] for line in last.values())
    failed = {test: line["tail"] for test, line in last.items() if line["outcome"] == "failed"}
    unfinished = [test for test, line in last.items() if line["outcome"] == "started"]
    slowest = sorted((line for line in last.values() if "seconds" in line), key=lambda line: -line["seconds"])[:5]
    return {
        "counts": dict(counts),
        "failed": failed,
        "unfinished": unfinished,
        "slowest": {line["test"]: line["seconds"] for line in slowest},
    }


def run_cases(session: Session, *, seconds: float) -> None:
    """The errors and the microbenchmarks; a side that takes its process with it is left out of the next one."""
    log = session.work / "cases.jsonl"
    end = time.monotonic() + seconds

    def progress() -> None:
        session.record["cases"] = [line["case"] for line in read(log) if "case" in line]
        session.save()

    sizes = ["toy"] if session.dry else ["errors", "gpu"]
    command = ["-m", "bench.worker", *OPS, "--out", str(log), "--device", "cpu" if session.dry else "cuda"]
    command += [word for size in sizes for word in ("--size", size)]
    if session.dry:
        command += ["--rounds", "3", "--threads", "1"]
    for _ in range(1 + RESTARTS):
        left = end - time.monotonic()
        if left < 10:
            break
        # The last case may begin a while before the end, and needs some time to finish.
        status = session.run("cases", [*command, "--seconds", f"{left - 25:.0f}"], seconds=left, progress=progress)
        if status == 0:
            break
        lines = read(log)
        if lines and "starting" in lines[-1]:
            reason = f"ended its process: {session.record['parts']['cases']['tail']}"
            append(log, failed=[*lines[-1]["starting"], reason])


def run_script(session: Session, script: str, *, seconds: float) -> None:
    """A benchmark of its own, if it is there and knows GPUs."""
    name, missing = Path(script).stem, absence(script)
    if missing:
        session.record["parts"][name] = {"absent": missing}
        session.save()
        return
    result = session.work / f"{name}.json"
    command = [script, "--help"] if session.dry else [script, "--device", "cuda", "--json", str(result)]
    session.run(name, command, seconds=seconds)
    if result.exists():
        session.record["parts"][name]["result"] = json.loads(result.read_text())
        session.save()


def absence(script: str) -> str | None:
    """Why a benchmark cannot be run on a GPU, None where it can."""
    path = ROOT / script
    if not path.exists():
        return "there is no such file"
    for module in NEEDS.get(script, ()):
        if missing := import_error(module):
            return missing
    return None if '"--device"' in path.read_text() else "it has no --device option: it measures the CPU only"


def problems(record: dict[str, Any]) -> list[str]:
    """What did not go as it should: parts that did not end well, tests, and our own sides; peers may fail."""
    found = [
        f"{name}: exit {part['exit']}"
        for name, part in record["parts"].items()
        if "absent" not in part and part["exit"]
    ]
    tests = record.get("tests", {"failed": {}, "unfinished": []})
    found += [f"test {test}" for test in (*tests["failed"], *tests["unfinished"])]
    for case in record.get("cases", []):
        ours = [side for side in case["failed"] if side.startswith("ttpa") or " " in side]  # or the case as a whole
        ours += [side for side, entry in case["sides"].items() if side.startswith("ttpa") and _not_a_number(entry)]
        found += [f"{case['op']} {case['case']}: {side}" for side in ours]
    return found


def _not_a_number(entry: dict[str, Any]) -> bool:
    return any(math.isnan(float(value)) for error in entry.get("errors", {}).values() for value in error.values())


def markdown(record: dict[str, Any]) -> str:
    """The whole record for a reader."""
    lines = [f"# {record['device']}", "", report.heading(record), f"- `python {' '.join(record['command'])}`", ""]
    lines += ["| part | seconds | result |", "|---|---:|---|"]
    for name, part in record["parts"].items():
        result = f"absent: {part['absent']}" if "absent" in part else f"exit {part['exit']}"
        lines.append(f"| {name} | {part.get('seconds', '')} | {result} |")
    found = problems(record)
    lines += ["", "What did not go as it should:" if found else "All went as it should.", ""]
    lines += [f"- {problem}" for problem in found]
    tests = record.get("tests")
    if tests:
        counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(tests["counts"].items()))
        lines += ["", "## Tests", "", counts or "none ran"]
        for test, tail in tests["failed"].items():
            lines += ["", f"`{test}` failed:", "", "```", tail, "```"]
        lines += ["", *(f"- not finished: `{test}`" for test in tests["unfinished"])]
    cases = record.get("cases", [])
    for title, chosen in (
        ("Times", [case for case in cases if case["size"] != "errors"]),
        ("Errors", [case for case in cases if case["size"] == "errors"]),
    ):
        if chosen:
            lines += ["", f"## {title}", "", report.LEGEND, *(report.table(case) for case in chosen)]
    for name, part in record["parts"].items():
        if name not in ("tests", "cases") and "tail" in part:
            lines += ["", f"## {name}", "", "```", part["tail"], "```"]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="the plan on the CPU, at toy sizes")
    parser.add_argument("--output", type=Path, help="folder of the results; default: bench/results/<device>")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print(
            "There is no GPU here (torch.cuda.is_available() is False), so nothing was measured. "
            "`python -m bench.gpu --dry-run` goes through the same plan on the CPU.",
            file=sys.stderr,
        )
        return 2
    machine = report.machine(torch.device("cpu" if options.dry_run else "cuda"))
    folder = options.output or (
        Path(tempfile.mkdtemp(prefix="ttpa-bench-"))
        if options.dry_run
        else ROOT / "bench" / "results" / report.slug(machine["device"])
    )
    folder.mkdir(parents=True, exist_ok=True)
    command = ["-m", "bench.gpu", *(["--dry-run"] if options.dry_run else [])]
    with tempfile.TemporaryDirectory() as work:
        session = Session(folder, Path(work), options.dry_run, {**machine, "command": command, "parts": {}})
        session.save()
        run_tests(session)
        later = sum(seconds for script, seconds in SCRIPTS.items() if not absence(script))
        run_cases(session, seconds=session.deadline - time.monotonic() - later)
        for script, seconds in SCRIPTS.items():
            run_script(session, script, seconds=seconds)
    for problem in (found := problems(session.record)):
        print(problem, file=sys.stderr)
    print(folder / "gpu.md")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
