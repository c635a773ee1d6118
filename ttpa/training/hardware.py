"""What the machine is capable of, and how much of its memory was taken."""

from __future__ import annotations

import re
import resource
import sys

import torch

PEAK_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
}
"""Operations per second of matrix products in bfloat16 with fp32 sums, by the words of a GPU's name: NVIDIA's data
sheets, and for GeForce its Ampere GA102 and Ada white papers. Where they count zeros of sparse matrices, half of it."""
_ONLY_A_PART = {"MIG", "LAPTOP", "D"}  # a slice of a GPU, and smaller ones that carry the name of a bigger


def peak_flops(name: str) -> float | None:
    """The highest rate of dense bfloat16 matrix products of a GPU by the name that CUDA gives it, in operations per
    second; None where it is not in PEAK_FLOPS."""
    words = set(re.findall(r"\w+", name.upper()))
    known = [gpu for gpu in PEAK_FLOPS if words >= set(gpu.upper().split()) and not words & _ONLY_A_PART]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def device_flops(device: torch.device) -> float | None:
    """`peak_flops` of a device; None for a CPU."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """The most memory in bytes that this process has had so far: of a GPU what torch allocated, else the resident
    set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
