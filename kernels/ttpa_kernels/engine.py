"""Which engine computes an operation, and on what kind of device."""

from __future__ import annotations

import os
from typing import Literal

import torch

Engine = Literal["triton", "torch"]
ARCHITECTURES = (80, 90, 100)  # the rows of every configuration table


def choose_engine(device: torch.device, engine: Engine | None = None) -> Engine:
    """The engine for tensors on `device`: Triton on GPUs of compute capability 8.0 and above, PyTorch elsewhere.

    An engine that is asked for is checked. Triton kernels run on the CPU only in the interpreter, that is with
    TRITON_INTERPRET=1 in the environment before triton is imported. Raises ValueError for an unknown engine and for
    one that cannot run there.
    """
    if engine not in (None, "triton", "torch"):
        raise ValueError(f"engine is {engine!r}: give 'triton', 'torch', or None to let the device decide")
    if device.type == "cuda":
        capable = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capable = device.type == "cpu" and engine == "triton" and interpreting()
    if engine == "triton" and not capable:
        raise ValueError(
            f"engine='triton' cannot run on {device}: use a GPU of compute capability 8.0 or above, engine='torch', "
            "or set TRITON_INTERPRET=1 before Python starts to run kernels in the interpreter"
        )
    return engine or ("triton" if capable else "torch")


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def architecture(device: torch.device) -> int:
    """The row of the configuration tables for `device`: 80, 90 or 100; 90 in the interpreter.

    GPUs of compute capability 12 have the shared memory and the matrix instructions of 8.x.
    """
    if device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


def descriptors_fit(*matrices: torch.Tensor) -> bool:
    """Whether tensor descriptors (TMA) can load these matrices: compute capability 9.0 and 16-byte aligned rows."""
    device = matrices[0].device
    if architecture(device) < 90:
        return False
    return all(
        m.stride(-1) == 1 and m.data_ptr() % 16 == 0 and m.stride(-2) * m.element_size() % 16 == 0 for m in matrices
    )
