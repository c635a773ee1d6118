"""What the shipped kernels of an operation use on every architecture, from `python -m ttpa_kernels.ahead`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from ttpa_kernels.engine import ARCHITECTURES

NEWEST = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}  # the matrix instructions of an architecture


def shipped(only: str) -> list[dict]:
    """One line a kernel whose name contains `only` and architecture; one process an architecture, side by side."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "ttpa_kernels.ahead", "--json", "--only", only, "--arch"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(arch)], env=environment, **pipes) for arch in ARCHITECTURES]
    lines = []
    for architecture, process in zip(ARCHITECTURES, processes, strict=True):
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        found = [json.loads(line) for line in output.splitlines()]
        assert found and {line["architecture"] for line in found} == {architecture}
        lines += found
    return lines
