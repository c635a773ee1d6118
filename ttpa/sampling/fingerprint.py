"""What a sampling run depends on, in short texts that can be compared."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable

import torch

from ttpa.data.dialogues import Dialogue

PACKAGES = ("ttpa", "torch", "triton", "transformers", "tokenizers")


def hash_of_dialogues(dialogues: Iterable[Dialogue]) -> str:
    """A hash of what the dialogues say, however their file is formatted."""
    text = json.dumps([dialogue.to_dict() for dialogue in dialogues])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def name_of_device(device: torch.device) -> str:
    """The kind of processor; on another one the last bits of a result may be others."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    """The versions of what computes a run, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout, or without Triton
            found[package] = "not installed"
    return found
