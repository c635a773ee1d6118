"""Compile the shipped kernels for GPUs that need not be there, and show what they use.

    python -m ttpa_kernels.ahead                   # a table for sm_80, sm_90 and sm_100
    python -m ttpa_kernels.ahead --arch 90 --json  # one object a kernel and line

A kernel module says what it ships with a function `variants(architecture)`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ttpa_kernels.engine import ARCHITECTURES, interpreting

MODULES: tuple[str, ...] = (
    "linear_logp.kernel",
    "linear_kl.kernel",
    "token_dpo.kernel",
    "next_token.kernel",
    "tree_attention.kernel",
    "paged_attention.kernel",
)


class Variant(NamedTuple):
    """A kernel with everything fixed that is fixed when it is compiled.

    `signature` holds the types of the runtime arguments as Triton writes them (`*bf16`, `i32`, `fp32`,
    `tensordesc<bf16[128,64]>`), `constants` the values of the constexpr arguments (None for an absent pointer), and
    `aligned` the names of the pointers and integers that are divisible by 16.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses: registers and stack bytes a thread, bytes of shared memory, matrix instructions."""

    name: str
    architecture: int
    registers: int
    stack: int
    shared: int
    matrix: str


def compile_ahead(variant: Variant, architecture: int) -> Resources:
    """Compile for `sm_<architecture>` and read the resources from the machine code with Triton's own cuobjdump."""
    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    missing = [name for name in names if name not in variant.signature and name not in variant.constants]
    assert not missing, f"{variant.name}: no type and no value for {missing}"
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.kernel, signature=signature, constexprs=variant.constants, attrs=attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK"))
    ptx = compiled.asm["ptx"]
    matrix = next((word for word in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if word in ptx), "")
    return Resources(variant.name, architecture, registers, stack, compiled.metadata.shared, matrix)


def variants(architecture: int) -> Iterator[Variant]:
    """All shipped variants of all kernels."""
    for module in MODULES:
        yield from importlib.import_module(f"ttpa_kernels.{module}").variants(architecture)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ttpa_kernels.ahead", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append", help="default: all three")
    parser.add_argument("--only", default="", help="names that contain this text")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    options = parser.parse_args()
    if interpreting():
        parser.error("TRITON_INTERPRET=1 is set: unset it, interpreted kernels are not compiled")
    if not options.json:
        print(f"{'kernel':<64} {'arch':>5} {'registers':>9} {'stack':>6} {'shared':>7}  matrix instructions")
    for architecture in options.arch or ARCHITECTURES:
        for variant in variants(architecture):
            if options.only not in variant.name:
                continue
            used = compile_ahead(variant, architecture)
            if options.json:
                print(json.dumps(asdict(used)), flush=True)
            else:
                line = f"{used.name:<64} {used.architecture:>5} {used.registers:>9} {used.stack:>6} {used.shared:>7}"
                print(f"{line}  {used.matrix}", flush=True)


if __name__ == "__main__":
    main()
