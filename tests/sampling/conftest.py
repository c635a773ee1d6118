"""A model that hesitates, trained once for all tests of the sampler."""

from __future__ import annotations

import pytest
import torch
from hesitant import asking, calling, train
from transformers import Qwen3Config, Qwen3ForCausalLM


@pytest.fixture(scope="session")
def hesitant(tokenizer):
    """Calls `weather` for Rome, or for Oslo, or asks for the time."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    examples = [
        (asking("right", "Rome"), 0.5),
        (asking("oslo", "Rome", calling("weather", city="Oslo", days=2)), 0.3),
        (asking("time", "Rome", calling("time")), 0.2),
    ]
    return train(Qwen3ForCausalLM(config).float(), tokenizer, examples, steps=100)
