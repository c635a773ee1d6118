"""A pytest plugin (`-p bench.pytest_log`) that writes each outcome to the file TTPA_TEST_LOG as soon as it is known."""

from __future__ import annotations

import json
import os
from typing import Any

TAIL = 15  # lines of a failure


def _write(**line: Any) -> None:
    with open(os.environ["TTPA_TEST_LOG"], "a") as file:
        print(json.dumps(line), file=file)


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(test=nodeid, outcome="started")


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        tail = report.longreprtext.strip().splitlines()[-TAIL:] if report.outcome == "failed" else []
        _write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), tail="\n".join(tail))


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write(test=report.nodeid, outcome="failed", seconds=0.0, tail=report.longreprtext.strip()[-1500:])
