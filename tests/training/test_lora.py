from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from random_trees import random_tree
from ranks import run_ranks
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM, Qwen3Config, Qwen3ForCausalLM
from ttpa_kernels import linear_logp

from ttpa.errors import InputError
from ttpa.model import head_weight, packed_hidden, use_tree_attention
from ttpa.training.distributed import make_mesh, shard_policy
from ttpa.training.lora import (
    LoraOptions,
    add_lora,
    four_bit_config,
    head_adapter,
    lora_layers,
    merge,
    save_adapter,
)
from ttpa.training.memory import checkpoint_activations
from ttpa.training.policy import Policy
from ttpa.trees.pack import pack_trees
from ttpa.world import joined_world

pytest.importorskip("peft")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
WITH_HEAD = LoraOptions(r=4, alpha=8, target_modules="all-linear,lm_head")
IDS = torch.arange(1, 20)[None]


def make(*, tied: bool = False, **sizes: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(**{**SIZES, **sizes}, tie_word_embeddings=tied)
    return use_tree_attention(Qwen3ForCausalLM(config).eval())


def trained(options: LoraOptions = WITH_HEAD, *, tied: bool = False) -> Qwen3ForCausalLM:
    """A model whose adapter does something, as after some steps of training."""
    model = add_lora(make(tied=tied), options)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_(std=0.1)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_only_the_adapter_is_trained_in_fp32_and_at_first_it_changes_nothing():
    plain, model = make().bfloat16(), make().bfloat16()
    assert add_lora(model, LoraOptions()) is model and isinstance(model, Qwen3ForCausalLM)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name
    assert torch.equal(logits(model), logits(plain))
    assert len(lora_layers(model)) == 7 * 2 and head_adapter(model) is None


def test_the_seed_alone_decides_the_adapter():
    models = [make() for _ in range(3)]
    torch.manual_seed(5)
    first, same, other = (
        add_lora(model, LoraOptions(), seed=seed).state_dict()["model.layers.1.mlp.up_proj.lora_A.default.weight"]
        for model, seed in zip(models, (1, 1, 2), strict=True)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert drawn == torch.rand(1)


@pytest.mark.parametrize(
    ("options", "scaling"), [({}, 2.0), ({"use_rslora": True}, 4.0), ({"target_modules": "lm_head"}, 2.0)]
)
def test_an_adapter_on_the_head_gives_the_log_probabilities_and_gradients_of_pefts_own_head(options, scaling):
    model = trained(LoraOptions(r=4, alpha=8, **{"target_modules": "q_proj, lm_head"} | options))
    batch = pack_trees([random_tree(seed) for seed in (1, 2)])
    adapter = head_adapter(model)
    assert adapter is not None and adapter.scaling == scaling
    coefficient_R = torch.randn(len(batch.row_R))
    found = []
    for fused in (True, False):
        hidden_RH = packed_hidden(model, batch)[batch.row_R]
        if fused:
            logp_R = linear_logp(hidden_RH, head_weight(model), batch.target_R, **adapter.options(hidden_RH))
        else:
            logp_RV = model.get_output_embeddings()(hidden_RH).log_softmax(dim=-1)
            logp_R = logp_RV.gather(1, batch.target_R[:, None])[:, 0]
        model.zero_grad()
        (logp_R * coefficient_R).sum().backward()
        found.append([logp_R.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(gradient.norm() > 0 for gradient in found[0])
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


def test_autocast_does_not_round_what_the_head_reads():
    model, hidden_RH = trained(), torch.randn(5, 32)
    exact = head_adapter(model).options(hidden_RH)
    with torch.autocast("cpu", torch.bfloat16):
        inside = head_adapter(model).options(hidden_RH)
    assert all(torch.equal(exact[name], inside[name]) for name in exact)
    assert {x.dtype for x in head_adapter(model).options(hidden_RH.bfloat16()).values()} == {torch.bfloat16}


def test_targets_that_are_no_linear_layers_are_refused_by_the_nearest_name():
    for targets, message in [
        ("q_proj,v_prj", "v_prj: the model has no linear layer of this name; did you mean v_proj"),
        ("embed_tokens", "embed_tokens: the model has no linear layer of this name; "),
        ("all_linear", "all_linear: .* did you mean all-linear"),
        ("layers.7.self_attn.q_proj", "layers.7.self_attn.q_proj: .* did you mean model.layers.[01].self_attn.q_proj"),
    ]:
        with pytest.raises(InputError, match=f"^--lora_target_modules {message}"):
            add_lora(make(), LoraOptions(target_modules=targets))
    model = add_lora(make(), LoraOptions(target_modules="layers.1.self_attn.q_proj, down_proj"))
    assert {name.split("layers.")[1] for name in lora_layers(model)} == {
        "1.self_attn.q_proj",
        "0.mlp.down_proj",
        "1.mlp.down_proj",
    }


def test_options_that_make_no_sense_are_refused():
    for options, message in [
        ({"r": 0}, "--lora_r"),
        ({"alpha": 0}, "--lora_alpha"),
        ({"target_modules": ","}, "empty"),
    ]:
        with pytest.raises(InputError, match=message):
            LoraOptions(**options)
    with pytest.raises(InputError, match="already has an adapter"):
        add_lora(trained(), LoraOptions())


def test_names_that_peft_takes_for_experts_are_refused():
    experts = {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**SIZES, **experts))
    with warnings.catch_warnings(), pytest.raises(InputError, match="the experts of 'glm4_moe'"):
        warnings.simplefilter("ignore")
        add_lora(model, LoraOptions())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"peft: pip install 'ttpa\[lora\]'"):
        add_lora(make(), LoraOptions())


@pytest.mark.parametrize("tied", [False, True])
def test_peft_loads_a_saved_adapter(tmp_path, tied):
    from peft import PeftModel

    model = trained(tied=tied)
    save_adapter(model, tmp_path / "not", base="org/name", write=False)
    save_adapter(model, tmp_path / "adapter", base="org/name")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft: a tied head has an adapter
        loaded = PeftModel.from_pretrained(make(tied=tied), str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(model))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_adapter(model, tmp_path / "file" / "adapter", base="org/name")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [LoraOptions(), WITH_HEAD])
def test_transformers_loads_a_merged_model(tmp_path, tied, options):
    model = trained(options, tied=tied)
    want = logits(model)
    assert merge(model) is model and not lora_layers(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-5)
    shares = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert shares == (tied and options is not WITH_HEAD)


def coefficients(batch) -> torch.Tensor:
    return torch.linspace(-1, 1, batch.num_trained)


def fused_logps(policy: Policy, batch) -> torch.Tensor:
    def compute(model):
        hidden_RH = packed_hidden(model, batch)[batch.row_R[: batch.num_trained]]
        adapter = head_adapter(model)
        options = {} if adapter is None else adapter.options(hidden_RH)
        return (linear_logp(hidden_RH, head_weight(model), batch.target_R[: batch.num_trained], **options),)

    return policy(compute)[0]


def sharded_equals_single(folder: str) -> None:
    batches = [pack_trees([random_tree(seed, num_leaves=3 + seed)]) for seed in (1, 2)]
    with joined_world() as world:
        single = Policy(trained(tied=True))
        for batch in batches:
            (fused_logps(single, batch) * coefficients(batch)).sum().backward()

        policy = Policy(trained(tied=True))
        checkpoint_activations(policy.model, "selective" if world.main else "full")
        shard_policy(policy, policy.blocks, mesh=make_mesh(world, shard_size=None), bf16=False)
        mine = batches[world.rank]
        (fused_logps(policy, mine) * coefficients(mine)).sum().backward()
        compared = 0
        for (name, sharded), whole in zip(policy.named_parameters(), single.parameters(), strict=True):
            assert isinstance(sharded, DTensor) and (sharded.grad is None) == (whole.grad is None), name
            if whole.grad is not None:
                got = sharded.grad.full_tensor()
                assert (got - whole.grad).norm() <= 1e-6 * whole.grad.norm(), name
                compared += 1
        assert compared == 2 * (7 * 2 + 1)

        save_adapter(policy.model, Path(folder) / "sharded", base="org/name", write=world.main)
        if world.main:
            save_adapter(single.model, Path(folder) / "single", base="org/name")


def test_two_ranks_have_the_gradients_of_one_process(tmp_path):
    run_ranks(sharded_equals_single, 2, str(tmp_path))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "sharded" / name).read_bytes() == (tmp_path / "single" / name).read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_weights_of_4_bits_are_refused_on_a_cpu():
    with pytest.raises(InputError, match="--load_in_4bit needs a CUDA GPU"):
        four_bit_config()


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_weights_of_4_bits_is_trained_under_a_plain_head(tmp_path, device, tied):
    pytest.importorskip("bitsandbytes")
    make(tied=tied, hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=four_bit_config(), dtype=torch.bfloat16, device_map={"": device}
    )
    batch = pack_trees([random_tree(1)]).to(device)
    with torch.no_grad():
        reference = fused_logps(Policy(use_tree_attention(model), bf16=True), batch)
    add_lora(model, WITH_HEAD)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8 and head_weight(model).dtype == torch.bfloat16
    loss = (fused_logps(Policy(model, bf16=True), batch) - reference).sum()
    assert loss == 0
    loss.backward()
    B = [p for name, p in model.named_parameters() if ".lora_B." in name]
    assert all(p.dtype == torch.float32 and p.grad.norm() > 0 for p in B)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    with pytest.raises(InputError, match="4 bits"):
        merge(model)
