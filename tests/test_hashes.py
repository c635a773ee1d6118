"""Hashes of models and tokenizers change with what they stand for and with nothing else."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM

from ttpa.hashes import hash_of_model, hash_of_tokenizer


def test_the_hash_of_a_model_depends_on_its_weights_and_config_and_not_on_its_place(tiny_model, tmp_path):
    found = set()
    for folder in ("a", "b"):
        tiny_model.save_pretrained(tmp_path / folder)
        found.add(hash_of_model(AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)))
    assert len(found) == 1
    changed = copy.deepcopy(tiny_model)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    in_bf16 = copy.deepcopy(tiny_model).bfloat16()
    other_end = copy.deepcopy(tiny_model)
    other_end.generation_config.eos_token_id = 0
    other_eps = copy.deepcopy(tiny_model)
    other_eps.config.rms_norm_eps = 1e-3
    assert len({hash_of_model(model) for model in (tiny_model, changed, in_bf16, other_end, other_eps)}) == 5


def test_the_hash_of_a_tokenizer_depends_on_its_template_and_vocabulary(tokenizer):
    known = hash_of_tokenizer(tokenizer)
    other = copy.deepcopy(tokenizer)
    assert hash_of_tokenizer(other) == known
    other.chat_template += " "
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<new>"])
    assert len({known, hash_of_tokenizer(other), hash_of_tokenizer(longer)}) == 3
