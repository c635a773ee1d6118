from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from random_trees import random_tree
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from ttpa.errors import InputError
from ttpa.losses import token_dpo_loss
from ttpa.model import (
    TREE_ATTENTION,
    head_weight,
    load_model,
    load_tokenizer,
    packed_hidden,
    packed_logps,
    use_tree_attention,
)
from ttpa.trees.pack import pack_trees

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


def make(name: str, **options):
    config, model = MODELS[name]
    torch.manual_seed(0)
    return model(config(**{**SIZES, **options})).eval()


def separate_logps(model, trees, batch):
    """The slow twin: every completion in a forward of its own, each head row looked up there."""
    index = torch.arange(len(batch.ids_T))
    logps = {}
    for t, tree in enumerate(trees):
        for leaf in range(len(tree.leaves)):
            ids = tree.prompt_ids + tree.completion_ids(leaf)
            logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            for i in range(len(tree.prompt_ids), len(ids)):
                logps.setdefault((t, tuple(ids[: i + 1])), logp[i - 1, ids[i]])
    rows = []
    for row, target in zip(batch.row_R.tolist(), batch.target_R.tolist(), strict=True):
        t = int(torch.searchsorted(torch.tensor(batch.tree_starts[1:]), row, right=True))
        seen = (index <= row) & (row < batch.end_T)
        rows.append(logps[t, (*batch.ids_T[seen].tolist(), target)])
    return torch.stack(rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_separate(name, tied):
    trees = [random_tree(seed, num_leaves=5) for seed in (1, 2, 3)]
    batch = pack_trees(trees)
    plain = make(name, tie_word_embeddings=tied)
    model = use_tree_attention(make(name, tie_word_embeddings=tied))
    got, want = packed_logps(model, batch), separate_logps(plain, trees, batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    trained, coefficient = slice(0, batch.num_trained), torch.randn(batch.num_trained)
    (got[trained] * coefficient).sum().backward()
    (want[trained] * coefficient).sum().backward()
    for (parameter, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm(), parameter


def test_reported_rows_carry_no_gradient_and_can_be_left_out():
    batch = pack_trees([random_tree(1, tools=True)])
    assert 0 < batch.num_trained < len(batch.row_R)
    model = use_tree_attention(make("qwen3"))
    logp = packed_logps(model, batch)
    assert (
        torch.autograd.grad(logp[batch.num_trained :].sum(), head_weight(model), retain_graph=True)[0].abs().max() == 0
    )
    assert torch.autograd.grad(logp[: batch.num_trained].sum(), head_weight(model))[0].abs().max() > 0
    assert torch.equal(packed_logps(model, batch, report=False), logp[: batch.num_trained])


def test_the_loss_of_equal_models_is_ln_2_to_the_bit():
    model = use_tree_attention(make("qwen3")).train()
    reference = copy.deepcopy(model).eval()
    batch = pack_trees([random_tree(seed) for seed in range(5)])
    logp = packed_logps(model, batch)
    with torch.no_grad():
        ref_logp = packed_logps(reference, batch)
    assert torch.equal(logp, ref_logp)
    trained = slice(0, batch.num_trained)
    loss, _ = token_dpo_loss(logp_R=logp[trained], ref_logp_R=ref_logp[trained], C=batch.C)
    assert loss.item() == float(np.float32(math.log(2)))


def test_autocast_runs_and_keeps_equal_models_equal():
    model, batch = use_tree_attention(make("llama")), pack_trees([random_tree(seed) for seed in (1, 2)])
    exact = packed_logps(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = packed_logps(model, batch)
        with torch.no_grad():
            ref_logp = packed_logps(model, batch)
    assert logp.dtype == torch.float32 and torch.equal(logp, ref_logp)
    assert 0 < (logp - exact).abs().max() < 0.05
    logp.sum().backward()


def test_trees_of_a_pack_do_not_touch():
    trees = [random_tree(1, vocabulary=30), random_tree(2, vocabulary=30)]
    trees[1].prompt_ids = [39, *trees[1].prompt_ids]
    batch = pack_trees(trees)
    model = use_tree_attention(make("qwen3"))
    model.get_input_embeddings().weight.data[39] = torch.nan
    hidden = packed_hidden(model, batch)
    first = hidden[: batch.tree_starts[1]]
    assert not bool(first.isnan().any()) and bool(hidden[batch.tree_starts[1] :].isnan().all())
    assert torch.equal(first, packed_hidden(model, pack_trees(trees[:1])))


def test_gradient_checkpointing_changes_nothing():
    batch = pack_trees([random_tree(seed) for seed in (1, 2)])
    gradients = []
    for checkpointing in (False, True):
        model = use_tree_attention(make("qwen3")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        packed_logps(model, batch).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("name", MODELS)
def test_the_model_still_runs_and_generates(name):
    plain = make(name)
    model = use_tree_attention(make(name))
    packed_hidden(model, pack_trees([random_tree(1)]))
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])  # padded on the left
    assert torch.equal(model(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_models_do_not_share_the_setting():
    first, second = make("qwen3"), make("qwen3")
    use_tree_attention(first)
    assert first.config._attn_implementation == TREE_ATTENTION
    assert second.config._attn_implementation != TREE_ATTENTION


def test_loading(tmp_path, tokenizer):
    model = make("qwen3")
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m", dtype=torch.float32)
    assert loaded.config._attn_implementation == TREE_ATTENTION
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert load_model(tmp_path / "m", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_tokenizer(tmp_path / "m").chat_template == tokenizer.chat_template
    assert load_tokenizer(tmp_path / "m", dialect="hermes").tool_dialect == "hermes"
    with pytest.raises(InputError, match=r"--dialect mistral: the chat template .* writes tool calls as hermes does"):
        load_tokenizer(tmp_path / "m", dialect="mistral")
    loaded.save_pretrained(tmp_path / "again")  # what is saved is a plain model
    assert TREE_ATTENTION not in (tmp_path / "again" / "config.json").read_text()


def test_what_cannot_be_loaded(tmp_path, tokenizer):
    with pytest.raises(InputError, match="no such folder"):
        load_model(tmp_path / "none", dtype=torch.float32)
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(tmp_path / "empty", dtype=torch.float32)
    model = make("qwen3")
    model.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(tmp_path / "pickled", dtype=torch.float32)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(tmp_path / "bare")


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("mistral", {"sliding_window": 8}, "sliding-window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
        ("gemma2", {}, "sliding_attention"),
        ("cohere", {"logit_scale": 0.1}, "logit_scale"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling"),
        ("phi", {}, "head with a bias"),
        ("gpt_oss", {}, "sliding_attention"),
    ],
)
def test_models_that_cannot_be_served_are_refused_by_name(model_type, options, reason):
    config = AutoConfig.for_model(model_type, **{**SIZES, **options})
    if model_type == "gpt_oss":
        config.num_local_experts = 2
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=f"{model_type!r} cannot be run on trees: .*{reason}"):
        use_tree_attention(model)


def test_an_encoder_decoder_is_refused(tmp_path):
    config = T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'t5' cannot be run on trees: an encoder-decoder"):
        load_model(tmp_path, dtype=torch.float32)


def test_a_model_that_is_not_what_its_config_says_is_found_out():
    model = make("qwen3")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits / 4)
    with pytest.raises(InputError, match="log-probabilities over a tree are off"):
        use_tree_attention(model)


def test_attention_that_takes_no_tree_is_found_out():
    config = AutoConfig.for_model("nemotron", **SIZES)
    with pytest.raises(InputError, match="does not take a tree"):
        use_tree_attention(AutoModelForCausalLM.from_config(config))
