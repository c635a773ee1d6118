"""Peak rates by name, and memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ttpa.training.hardware import device_flops, peak_flops, peak_memory

STATUS = Path("/proc/self/status")


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_a_gpu_is_known_by_the_words_of_its_name(name, flops):
    assert peak_flops(name) == flops


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA L40",
        "Tesla T4",
    ],
)
def test_no_rate_is_made_up(name):
    assert peak_flops(name) is None
    assert device_flops(torch.device("cpu")) is None


@pytest.mark.skipif(not STATUS.exists(), reason="Linux says it in /proc")
def test_memory_is_the_highest_resident_set_in_bytes():
    found = peak_memory(torch.device("cpu"))
    (kib,) = (int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    assert found == pytest.approx(kib * 1024, rel=0.01)
