from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import random_tree
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from ttpa.model import packed_hidden, use_tree_attention
from ttpa.training.flops import (
    ModelShape,
    PackSize,
    forward_flops,
    pack_flops,
    size_of_batch,
    size_of_trees,
    size_without_sharing,
)
from ttpa.trees.pack import Term, pack_trees
from ttpa.trees.record import Leaf, Node, Pair, PreferenceTree

SIZES = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
CONFIGS = [
    Qwen3Config(**SIZES, intermediate_size=80, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=1, tie_word_embeddings=False),
]
TREES = [random_tree(seed) for seed in range(4)]


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def matrix_flops(model, batch) -> tuple[int, int]:
    """What PyTorch counts forward and backward for a pack. On a CPU it counts nothing for SDPA, and elsewhere the whole
    square for a mask of any kind, so that what attention costs is compared in a test of its own."""
    trained, logps = batch.num_trained, []

    def forward():
        hidden_TH, head = packed_hidden(model, batch), model.get_output_embeddings()
        logps.append(head(hidden_TH[batch.row_R[:trained]]).log_softmax(dim=-1))
        with torch.no_grad():
            head(hidden_TH[batch.row_R[trained:]])

    return counted(forward), counted(lambda: logps[0].sum().backward())


def expected_matrix_flops(shape, size) -> tuple[int, int]:
    forward = forward_flops(shape, size)
    backward = pack_flops(shape, size) - forward
    return forward - 4 * shape.attention * size.seen, backward - 8 * shape.attention * size.seen


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_matrices_cost_what_pytorch_counts(config):
    model = use_tree_attention(AutoModelForCausalLM.from_config(config))
    batch = pack_trees(TREES)
    assert 0 < batch.num_trained < len(batch.row_R)
    assert ModelShape.of(model) == ModelShape.of(config)
    expected = expected_matrix_flops(ModelShape.of(config), size_of_batch(batch))
    assert matrix_flops(model, batch) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_what_is_frozen_has_no_gradient_of_its_own(config):
    peft = pytest.importorskip("peft")
    model = use_tree_attention(AutoModelForCausalLM.from_config(config))
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"]), model)
    model.enable_input_require_grads()  # the first layer is charged for the gradient of its input like any other
    shape, batch = ModelShape.of(model), pack_trees(TREES)
    assert 0 < shape.linear_trained < shape.linear and shape.head_trained == 4 * (32 + 90)
    expected = expected_matrix_flops(shape, size_of_batch(batch))
    assert matrix_flops(model, batch) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_attention_costs_what_pytorch_counts_for_a_whole_square(config):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids, shape = torch.arange(1, 61)[None], ModelShape.of(config)
    with FlopCounterMode(display=False) as counter:
        model.get_decoder()(input_ids=ids).last_hidden_state.sum().backward()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    square = PackSize(tokens=0, seen=60 * 60, trained_rows=0, reported_rows=0)
    assert products == pytest.approx(pack_flops(shape, square), rel=0.01)


def test_an_expert_counts_for_the_tokens_that_go_to_it():
    sizes = {**SIZES, "num_key_value_heads": 2, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    few, many = (ModelShape.of(Qwen3MoeConfig(**sizes, num_experts=number)) for number in (4, 8))
    routers = 2 * 32 * (8 - 4)
    assert many.linear - few.linear == routers and few.linear > 2 * 2 * 3 * 32 * 24


def test_a_token_sees_itself_and_what_stands_before_it():
    end_T, index_T = pack_trees(TREES).end_T, torch.arange(len(pack_trees(TREES).end_T))
    sees = (index_T <= index_T[:, None]) & (index_T[:, None] < end_T)
    assert size_of_batch(pack_trees(TREES)).seen == int(sees.sum())


@settings(deadline=None)
@given(seeds=st.lists(st.integers(0, 500), min_size=1, max_size=3), sides=st.booleans(), given_weights=st.booleans())
def test_trees_have_the_size_of_their_pack(seeds, sides, given_weights):
    trees, rng = [random_tree(seed, tools=seed % 2 == 0) for seed in seeds], random.Random(seeds[0])
    trees[0].pairs = trees[0].pairs[1:] + [Pair(0, 0)]  # leaf 1 may not be packed, one is paired with itself
    weights = None
    if given_weights:
        weights = [
            [
                [[rng.choice([0, 1, 2]) for _ in tree.trained(leaf)] for leaf in (p.chosen, p.rejected)]
                for p in tree.pairs
            ]
            for tree in trees
        ]
    terms = [Term(weights, sides), Term()]
    size = size_of_trees(trees, terms=terms)
    assert size == size_of_batch(pack_trees(trees, terms=terms))
    assert size == sum(
        (
            size_of_trees([tree], terms=[Term(weights and weights[t : t + 1], sides), Term()])
            for t, tree in enumerate(trees)
        ),
        start=PackSize(0, 0, 0, 0),
    )


def test_without_sharing_every_side_of_every_pair_is_a_row():
    tree = random_tree(3, tools=True)
    rows = [
        PreferenceTree(
            "row", tree.prompt_ids, [Node(-1, tree.completion_ids(leaf), trained=tree.trained(leaf))], [], []
        )
        for pair in tree.pairs
        for leaf in (pair.chosen, pair.rejected)
    ]
    for row in rows:
        row.leaves, row.pairs = [Leaf(0, "given")], [Pair(0, 0)]
    alone = size_of_batch(pack_trees(rows, terms=[Term(sides=True)]))
    assert alone.reported_rows == 0 and size_without_sharing([tree]) == alone
    tree.pairs = [Pair(1, 1)]
    assert size_without_sharing([tree]) == size_of_trees([tree], terms=[Term(sides=True)])
