"""What many tests share: a tokenizer and a small model that need no download."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels run in its interpreter; read when triton is imported

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import ttpa.embedded

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level without merges: every byte is a token, beside the special tokens and the tags of the chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:2]})
    fast.add_tokens(TAGS)
    fast.chat_template = (Path(ttpa.embedded.__file__).parent / "chat_template.jinja").read_text()
    return fast


@pytest.fixture
def tiny_model(tokenizer) -> Qwen3ForCausalLM:
    """A random Qwen3 of 2 layers in fp32, with the vocabulary of `tokenizer`."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config).float().eval()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of third-party test data, named by TTPA_REAL_DATA; tests that need it are skipped without it."""
    folder = os.environ.get("TTPA_REAL_DATA")
    if not folder:
        pytest.skip("TTPA_REAL_DATA is not set: it names the folder with bfcl/ and toolbench/")
    return Path(folder)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
