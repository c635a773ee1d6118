"""How fast devices train: measured where they are in rates.json, else a share of what a data sheet says."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import NamedTuple

import torch

from ttpa.training.hardware import PEAK_FLOPS, peak_flops

TABLE = Path(__file__).with_name("rates.json")
SHARE_OF_PEAK = 0.4  # of a data sheet's rate that is assumed where nothing was measured
ASSUMED_GPU = "H100"  # in a plan for a GPU that is not there


class Rate(NamedTuple):
    """Flops per second of training steps (`pack_flops` by the time of whole steps), None where nobody knows; and how
    the number was come by."""

    flops: float | None
    source: str


def rate_of(device: torch.device | None, *, bf16: bool) -> Rate:
    """The rate of a device, with as many threads as torch has now; None stands for a GPU that is not there."""
    dtype = "bf16" if bf16 else "fp32"
    name = ASSUMED_GPU if device is None else device_name(device)
    threads = torch.get_num_threads() if device is not None and device.type == "cpu" else None
    for record in json.loads(TABLE.read_text(encoding="utf-8"))["rates"]:
        if (record["device"], record["threads"], record["dtype"]) == (name, threads, dtype):
            return Rate(record["step_flops"], f"measured, {record['command']}")
    on = f"{name}, {dtype}" + (f", {threads} threads" if threads else "")
    highest = PEAK_FLOPS[ASSUMED_GPU] if device is None else peak_flops(name)
    if not bf16 or highest is None:
        return Rate(None, f"{on} is not in {TABLE.name}")
    return Rate(
        SHARE_OF_PEAK * highest,
        f"not measured, {SHARE_OF_PEAK:.0%} of the {highest:.3g} of the data sheet of {name} is assumed",
    )


def device_name(device: torch.device) -> str:
    """What a GPU calls itself, or the CPU of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
