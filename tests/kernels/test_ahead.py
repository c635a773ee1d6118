from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ahead
CROWDED = """
import triton
import triton.language as tl
from ttpa_kernels.ahead import Variant, compile_ahead


@triton.jit
def crowded(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    values = tl.load(x + at)
    total = tl.sum(values, axis=0)
    for _ in range(10):
        values = values * total
        total = tl.sum(values, axis=0)
    tl.store(y + at, values)


variant = Variant("crowded", crowded, {"x": "*fp32", "y": "*fp32"}, {"N": 16384}, 1, 1, ("x", "y"))
print(compile_ahead(variant, 90).stack)
"""


def command(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    program = [sys.executable, "-m", "ttpa_kernels.ahead", *arguments]
    return subprocess.run(program, env=environment, capture_output=True, text=True)


def test_json_has_one_object_a_kernel():
    ran = command("--json", "--only", "linear_logp rescale", "--arch", "80", "--arch", "90")
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line["architecture"] for line in lines] == sorted(line["architecture"] for line in lines)
    assert {line["architecture"] for line in lines} == {80, 90} and len(lines) >= 4
    for line in lines:
        assert line["name"].startswith("linear_logp rescale") and line["matrix"] == ""
        assert 0 < line["registers"] <= 255 and line["stack"] == 0 and line["shared"] >= 0


def test_the_table_says_the_same():
    ran = command("--only", "linear_logp fold bf16", "--arch", "90")
    assert ran.returncode == 0, ran.stderr
    heading, *rows = ran.stdout.splitlines()
    assert heading.split()[:4] == ["kernel", "arch", "registers", "stack"]
    ran = command("--json", "--only", "linear_logp fold bf16", "--arch", "90")
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert rows and len(rows) == len(found)
    for row, line in zip(rows, found, strict=True):
        numbers = row[64:].split()
        assert row[:64].strip() == line["name"]
        assert numbers[:4] == [str(line[key]) for key in ("architecture", "registers", "stack", "shared")]


def test_a_stack_shows(tmp_path):
    """A kernel that holds more than the registers of one warp is not passed as free of spills."""
    (tmp_path / "crowded.py").write_text(CROWDED)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "crowded.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 0


@pytest.mark.parametrize(("arguments", "interpret"), [(("--arch", "75"), False), ((), True)])
def test_what_it_refuses(arguments, interpret):
    ran = command(*arguments, interpret=interpret)
    assert ran.returncode == 2
    assert ("TRITON_INTERPRET" in ran.stderr) if interpret else ("75" in ran.stderr)
