"""What a sampling run depends on, in short texts that can be compared."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from ttpa.data.dialogues import Dialogue

PACKAGES = ("ttpa", "torch", "triton", "transformers", "tokenizers")


def hash_of_model(model: PreTrainedModel) -> str:
    """A hash of the config and of every weight and buffer, the dtype included, wherever they were loaded from."""
    found = hashlib.sha256()
    for config in (model.config, model.generation_config):
        # where it lies and what saved it say nothing about the model
        values = {**config.to_dict(), "_name_or_path": None, "transformers_version": None} if config else None
        found.update(json.dumps(values, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def hash_of_tokenizer(tokenizer: Any) -> str:
    """A hash of the chat template, the vocabulary and the end-of-text token."""
    parts = [str(tokenizer.chat_template), sorted(tokenizer.get_vocab().items()), tokenizer.eos_token]
    return _hash(json.dumps(parts))


def hash_of_dialogues(dialogues: Iterable[Dialogue]) -> str:
    """A hash of what the dialogues say, however their file is formatted."""
    return _hash(json.dumps([dialogue.to_dict() for dialogue in dialogues]))


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


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
