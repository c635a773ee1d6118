from __future__ import annotations

import copy
from pathlib import Path

import pytest
import trl
from random_trees import random_tree

from ttpa.errors import InputError
from ttpa.esm.weights import WeightOptions, key_token_weights, pair_weights
from ttpa.losses import LossOptions, LossTerm
from ttpa.training.examples import denominators, make_examples
from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions

WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
WEATHERS = WEATHER.replace("get_weather", "get_weathers")
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("get_weather", "get_weathers")
]


def examples_of(trees, names, tokenizer=None, **given):
    defaults = {"options": LossOptions(), "token_weights": None, "error_weights": WeightOptions()}
    terms = [LossTerm(name) for name in names.split(",")]
    return make_examples(trees, tokenizer=tokenizer, terms=terms, **{**defaults, **given})


def call_tree(tokenizer):
    """A wrong tool name with an error on record."""
    error = {"code": "tool.unknown", "call": 0, "pointer": "", "tokens": [0, 1]}
    nodes, leaves = merge_completions(
        Completion(tokenizer.encode(text, add_special_tokens=False), leaf)
        for text, leaf in ((WEATHER, Leaf(0, "gold")), (WEATHERS, Leaf(0, "branch", errors=[error])))
    )
    return PreferenceTree("call", [1, 2], nodes, leaves, [Pair(0, 1)], tools=TOOLS)


def test_a_term_starts_from_its_own_token_weights_unless_told_otherwise(tokenizer):
    tree = call_tree(tokenizer)
    (pair,), options = tree.pairs, WeightOptions(error=2.0, follow=0.25)
    by_errors = pair_weights(tree, pair, tokenizer, options)
    by_keys = key_token_weights(tree, pair, tokenizer)
    ones = (tree.trained(0), tree.trained(1))
    assert by_errors != ones != by_keys != by_errors
    given = {"tokenizer": tokenizer, "error_weights": options}
    (example,) = examples_of([tree], "ttpa,sigmoid,sft", **given)
    assert example.weights == [[by_errors], [ones], [([1] * len(ones[0]), [0.0] * len(ones[1]))]]
    for token_weights, want in (("errors", by_errors), ("keys", by_keys), ("ones", ones)):
        (example,) = examples_of([tree], "ttpa,sigmoid,sft", token_weights=token_weights, **given)
        assert example.weights[:2] == [[want], [want]] and example.weights[2][0][0] == [1] * len(ones[0])


def test_trees_without_pairs_are_left_out_and_scores_stay_with_their_tree():
    trees = [random_tree(seed, tools=True) for seed in range(3)]
    trees[1].pairs = []
    scores = []
    for t, tree in enumerate(trees):
        lengths = [[len(tree.completion_ids(leaf)) for leaf in (pair.chosen, pair.rejected)] for pair in tree.pairs]
        scores.append([([t + p] * chosen, [0.0] * rejected) for p, (chosen, rejected) in enumerate(lengths)])
    got = examples_of(trees, "tgdpo", scores=scores, options=LossOptions(beta=1.0, tgdpo_alpha=1.0))
    assert [example.tree.id for example in got] == ["tree0", "tree2"]
    for t, example in zip((0, 2), got, strict=True):
        for p, (pair, (chosen, rejected)) in enumerate(zip(trees[t].pairs, example.weights[0], strict=True)):
            assert chosen == [(1 + p + t) * written for written in trees[t].trained(pair.chosen)]
            assert rejected == trees[t].trained(pair.rejected)
    with pytest.raises(InputError, match=r"--loss_type tgdpo .* --score_model"):
        examples_of(trees, "sigmoid,tgdpo")


def test_sft_alone_packs_each_chosen_leaf_once():
    tree = random_tree(3, num_leaves=4, tools=True)
    tree.pairs = [Pair(2, 0), Pair(2, 1), Pair(3, 1)]
    (example,) = examples_of([tree], "sft")
    assert example.tree.pairs == [Pair(2, 2), Pair(3, 3)]
    nodes = {node for leaf in (2, 3) for node in tree.path(leaf)}
    written = sum(sum(tree.nodes[n].trained or [1] * len(tree.nodes[n].ids)) for n in nodes)
    assert denominators([example], terms=[LossTerm("sft")]) == [written]
    (beside,) = examples_of([tree], "ipo,sft")
    assert beside.tree.pairs == tree.pairs
    assert denominators([beside], terms=[LossTerm("ipo"), LossTerm("sft")]) == [3, written]
    assert not any(any(rejected) for _, rejected in beside.weights[1])


def test_weighted_likelihood_packs_every_leaf_that_the_model_wrote_something_of():
    trees = [random_tree(seed, tools=True) for seed in range(2)]
    trees[0].pairs = []
    copied = Completion([7], Leaf(0, "given"), trained=[0])
    nodes, leaves = merge_completions([copied, Completion([8, 9], Leaf(0, "given"))])
    given = PreferenceTree("given", [1], nodes, leaves, [])
    got = examples_of([*trees, given], "likelihood")
    assert [example.tree.pairs for example in got] == [[Pair(i, i) for i in range(4)]] * 2 + [[Pair(1, 1)]]
    for example in got:
        for pair, (chosen, rejected) in zip(example.tree.pairs, example.weights[0], strict=True):
            written = example.tree.trained(pair.chosen)
            assert chosen == pytest.approx([w / sum(written) for w in written]) and not any(rejected)
    assert denominators(got, terms=[LossTerm("likelihood")]) == [3]


def test_a_leaf_on_its_own_and_a_pair_cannot_be_trained_together():
    with pytest.raises(InputError, match="likelihood takes every leaf on its own"):
        examples_of([random_tree(0)], "likelihood,sigmoid")


def test_nothing_to_divide_by_is_1():
    assert denominators([], terms=[LossTerm("sigmoid"), LossTerm("sft"), LossTerm("likelihood")]) == [1, 1, 1]


def test_key_tokens_need_places(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = (Path(trl.__file__).parent / "chat_templates" / "glm4moe.jinja").read_text()
    assert examples_of([random_tree(0)], "sigmoid", other, token_weights="errors")
    with pytest.raises(InputError, match="--token_weights keys needs to know where a call stands"):
        examples_of([random_tree(0)], "sigmoid", other, token_weights="keys")
