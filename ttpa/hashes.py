"""What a model and a tokenizer are, in short texts that can be compared."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def hash_of_model(model: PreTrainedModel) -> str:
    """A hash of the config and of every weight and buffer, the dtype included, wherever they were loaded from; 16
    hexadecimal digits. Of a sharded model whole weights are hashed, gathered one by one: the hash does not depend on
    the number of processes, all of which have to call."""
    found = hashlib.sha256()
    for config in (model.config, model.generation_config):
        # where it lies and what saved it say nothing about the model
        values = {**config.to_dict(), "_name_or_path": None, "transformers_version": None} if config else None
        found.update(json.dumps(values, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found.update(f"{name} {whole.dtype} {list(whole.shape)}".encode())
        found.update(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def hash_of_tokenizer(tokenizer: Any) -> str:
    """A hash of the chat template, the vocabulary and the end-of-text token; 16 hexadecimal digits."""
    parts = [str(tokenizer.chat_template), sorted(tokenizer.get_vocab().items()), tokenizer.eos_token]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
