"""The states of the random number generators that a training step may draw from, as JSON values."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, and of the GPU's where `device` is one."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    return {
        "python": {"version": version, "words": _hex(np.array(words)), "gauss": gauss},
        "numpy": {**numpy, "state": {**numpy["state"], "key": _hex(numpy["state"]["key"])}},
        "torch": _hex(torch.get_rng_state().numpy()),
        "cuda": _hex(torch.cuda.get_rng_state(device).numpy()) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on with what `random_state` gave; the GPU's generator stays as it is where the state has none."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(_words(python["words"]).tolist()), python["gauss"]))
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": _words(numpy["state"]["key"])}})
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def _hex(values: np.ndarray) -> str:
    """Bytes as they are, anything else as words of 32 bits."""
    return values.astype("u1" if values.dtype == np.uint8 else "<u4").tobytes().hex()


def _words(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), dtype="<u4").astype(np.uint32)


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
