from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from random_trees import random_tree

from bench.plan import OBJECTIVE, TOYS, peak, planned
from ttpa.embedded import MODEL_DIR
from ttpa.errors import InputError
from ttpa.losses import LossOptions, LossTerm
from ttpa.model import load_tokenizer, use_tree_attention
from ttpa.training.config import TrainConfig
from ttpa.training.flops import ModelShape, pack_flops, size_of_batch
from ttpa.training.lora import LoraOptions, add_lora
from ttpa.training.objective import Objective
from ttpa.training.plan import fits, lay_out_work, make_plan, model_without_weights, plan_text, planned_examples, report
from ttpa.training.plan_table import Layout, explain_out_of_memory, memory_table, out_of_memory, render, total
from ttpa.training.rates import rate_of

TREES = [random_tree(seed) for seed in range(12)]
CONFIG = TrainConfig(model="m/m", loss_type="sigmoid", batch_size=10, pack_tokens=64, max_steps=-1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return TOYS["toy"].model()


@pytest.fixture(scope="module")
def pack():
    return OBJECTIVE.pack(TOYS["toy"].examples())


def sizes(model, pack, *, packs_per_step=1, **layout):
    table = memory_table(model, pack, layout=Layout(**{"kind": "cuda", **layout}), packs_per_step=packs_per_step)
    return {part.name: part.bytes for part in table}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set where Linux writes it")
@pytest.mark.parametrize("name", ["toy-packs", "toy-checkpointing"])
def test_the_table_agrees_with_the_measured_peak(name, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")  # freed memory goes back, so there is no row for it
    assert sum(planned(TOYS[name]).values()) == pytest.approx(peak(name, given_back=True, threads=1), rel=0.1)


def test_weights_and_optimizer_states_are_those_of_adamw_in_fp32(model, pack):
    number = sum(p.numel() for p in model.parameters())
    found = sizes(model, pack)
    assert (found["weights"], found["optimizer"]) == (4 * number, 8 * number)
    assert sizes(model, pack, packs_per_step=2)["gradients"] == 4 * number  # those of the first pack are all there
    assert sizes(model, pack, moving_reference=True)["reference"] == 4 * number


def test_shards_divide_what_lasts_and_whole_blocks_come_on_top(model, pack):
    one, four = sizes(model, pack), sizes(model, pack, shards=4)
    for name in ("weights", "optimizer"):
        assert four[name] == one[name] // 4
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.get_decoder().layers]
    root = sum(p.numel() for p in model.parameters()) - sum(blocks)
    assert four["gathered weights"] == 4 * (root + 2 * max(blocks))
    assert sizes(model, pack, shards=4, bf16=True)["gathered weights"] == 2 * (root + 2 * max(blocks))
    offloaded = sizes(model, pack, shards=4, offload="optimizer")
    assert offloaded["weights"] == offloaded["gradients"] == offloaded["optimizer"] == 0 < offloaded["activations"]


def test_what_takes_less_memory_is_seen_to():
    case = TOYS["toy-packs"]
    with torch.device("meta"):
        model = case.model()
    pack, half = (OBJECTIVE.pack(case.examples()[:number]) for number in (6, 3))
    plain = sizes(model, pack)["activations"]
    for layout in ({"checkpointing": "full"}, {"checkpointing": "selective"}, {"offload": "activations"}):
        assert sizes(model, pack, **layout)["activations"] < 0.75 * plain
    assert sizes(model, pack, bf16=True, shards=2)["activations"] < 0.75 * plain
    assert sizes(model, half)["activations"] == pytest.approx(plain / 2, rel=0.05)


def test_an_adapter_is_all_that_has_gradients_and_states(tiny_model):
    pack = OBJECTIVE.pack(TOYS["toy"].examples())
    adapted = add_lora(use_tree_attention(tiny_model), LoraOptions(r=4))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    found = sizes(adapted, pack, packs_per_step=2)
    assert found["optimizer"] == 2 * found["gradients"] == 8 * trained
    before = [p.detach().clone() for p in adapted.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(before, adapted.parameters(), strict=True))
    assert all(p.grad is None and p.device == CPU for p in adapted.parameters())


def test_the_divergence_needs_the_head_twice(model, pack):
    found = sizes(model, pack, divergence=True)
    assert found["reference head"] == model.lm_head.weight.nbytes
    assert found["head"] > sizes(model, pack)["head"]


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_work_is_that_of_the_packs(model, tokenizer, world_size):
    examples = planned_examples(TREES, tokenizer=tokenizer, objective=OBJECTIVE, config=CONFIG)
    config = replace(CONFIG, num_train_epochs=2)
    work = lay_out_work(examples, objective=OBJECTIVE, model=model, config=config, world_size=world_size)
    pairs = sum(len(tree.pairs) for tree in TREES)
    assert work.pairs == 2 * pairs and work.steps >= 2 * pairs / 20
    assert work.unshared.tokens > work.size.tokens >= 2 * size_of_batch(OBJECTIVE.pack(examples)).tokens
    whole = lay_out_work(
        examples, objective=OBJECTIVE, model=model, config=replace(config, pack_tokens=10_000), world_size=1
    )
    everything = size_of_batch(OBJECTIVE.pack(examples))
    assert whole.size.tokens == 2 * everything.tokens and whole.packs == whole.steps
    assert whole.flops == pytest.approx(2 * pack_flops(ModelShape.of(model), everything))
    assert work.slowest_flops * world_size >= work.flops


def test_a_loss_with_scores_is_planned_without_the_helper_model(tokenizer):
    objective = Objective((LossTerm("tis", 1.0),), LossOptions())
    examples = planned_examples(TREES, tokenizer=tokenizer, objective=objective, config=CONFIG)
    assert objective.pack(examples).num_trained > 0


def test_the_command_prints_memory_work_and_time_without_weights(tmp_path):
    with torch.device("meta"):
        TOYS["toy"].model().config.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((MODEL_DIR / name).read_bytes())
    plan = partial(
        plan_text, TREES, source=tmp_path, tokenizer=load_tokenizer(tmp_path), objective=OBJECTIVE, device=CPU
    )
    text = plan(config=CONFIG)
    for words in ("weights", "optimizer", "activations", "total", "fits into", "flops", "a trainer that shares no"):
        assert words in text
    assert "what to change" not in text
    small = plan(config=replace(CONFIG, memory_gb=0.001, bf16=True))
    assert "does NOT fit into 1.0 MiB" in small and "40% of the 9.89e+14 of the data sheet of H100" in small
    lines = small[small.index("what to change") :].splitlines()[1:]
    names = [line.split("  ")[1] for line in lines if "saves" in line]
    assert names[0].startswith("--pack_tokens") and "--use_peft" in names
    order = ["--pack_tokens", "--activation_checkpointing", "2 processes", "--use_peft", "--offload"]
    places = [next(i for i, start in enumerate(order) if name.startswith(start)) for name in names]
    assert places == sorted(places)
    with pytest.raises(InputError, match="no pair"):
        plan_text([], source=tmp_path, tokenizer=None, objective=OBJECTIVE, device=CPU, config=CONFIG)
    with pytest.raises(InputError, match="cannot be loaded"):
        model_without_weights(tmp_path / "nothing", config=CONFIG)


def test_a_change_saves_what_the_changed_plan_says(model, tokenizer):
    examples = planned_examples(TREES, tokenizer=tokenizer, objective=OBJECTIVE, config=CONFIG)
    made = make_plan(examples, model=model, objective=OBJECTIVE, config=CONFIG, device=CPU)
    assert fits(made) and not fits(made._replace(available=total(made.table)))
    assert render(made.table) in report(made, config=CONFIG)


def test_a_rate_is_measured_or_said_to_be_assumed():
    assert rate_of(None, bf16=False).flops is None
    assumed = rate_of(None, bf16=True)
    assert assumed.flops == pytest.approx(0.4 * 989e12) and "not measured" in assumed.source


def test_out_of_memory_is_told_with_the_table_what_was_measured_and_three_options(model, pack):
    table = memory_table(model, pack, layout=Layout("cpu"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert out_of_memory(caught.value) and out_of_memory(MemoryError()) and not out_of_memory(RuntimeError("shape"))
    text = explain_out_of_memory(caught.value, table, CPU)
    assert render(table) in text and "out of memory on cpu" in text
    for option in ("--pack_tokens", "--activation_checkpointing full", "--use_peft"):
        assert option in text
    most = re.search(r"measured: process, most +([\d.,]+) (MiB|GiB)", text)
    assert most and float(most[1].replace(",", "")) > 0
    assert os.path.exists("/proc/self/statm") == ("measured: process, now" in text)
