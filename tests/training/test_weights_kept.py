"""Token weights in every dialect, and that they stay with their tokens when trees are merged, cut and packed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from dialect_writers import WRITERS
from hesitant import TOOLS

from ttpa.data.build import Limits
from ttpa.data.report import DataReport
from ttpa.esm.score import score_tokens
from ttpa.esm.weights import WeightOptions, key_token_weights, pair_weights
from ttpa.losses import LossOptions, LossTerm
from ttpa.tools.dialects import DIALECTS
from ttpa.training.examples import make_examples
from ttpa.trees.pack import Term, pack_trees
from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions

GOLD = [{"name": "weather", "arguments": {"city": "Oslo", "days": 3, "unit": "C"}}]
WRONG = {
    "value": [{"name": "weather", "arguments": {"city": "Rome", "days": 3, "unit": "C"}}],
    "missing": [{"name": "weather", "arguments": {"city": "Oslo", "unit": "C"}}],
    "two values": [{"name": "weather", "arguments": {"city": "Oslo", "days": 4, "unit": "F"}}],
    "tool": [{"name": "time", "arguments": {}}],
    "call": [],
}
HEAVY, LIGHT = 2.0, 0.5
OPTIONS = WeightOptions(HEAVY, LIGHT)
EVERY_DIALECT = pytest.mark.parametrize("dialect", DIALECTS)
RULES = {"errors": lambda *given: pair_weights(*given, OPTIONS), "keys": key_token_weights}


@pytest.fixture
def speaking(tokenizer, dialect):
    """A tokenizer of that dialect."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.tool_dialect = dialect
    return tokenizer


def tree_of(tokenizer, *kinds, name="t"):
    """The right calls and, each rejected to them, wrong ones of these kinds."""
    completions = []
    for calls in [GOLD, *(WRONG[kind] for kind in kinds)]:
        text = WRITERS[tokenizer.tool_dialect](calls) or "I cannot."
        ids = tokenizer(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"]
        score = score_tokens(tokenizer, ids, GOLD, TOOLS)
        completions.append(Completion(ids, Leaf(-1, "given", errors=[error.to_leaf() for error in score.errors])))
    nodes, leaves = merge_completions(completions)
    return PreferenceTree(name, [1], nodes, leaves, [Pair(0, i) for i in range(1, len(leaves))], tools=TOOLS)


def cut(tree, length):
    """The tree of two leaves with its completions cut after so many tokens, as they were scored before."""
    completions = [
        Completion(tree.completion_ids(leaf)[:length], Leaf(-1, "given", errors=tree.leaves[leaf].errors))
        for leaf in range(2)
    ]
    nodes, leaves = merge_completions(completions)
    return PreferenceTree(tree.id, [1], nodes, leaves, [Pair(0, 1)], tools=TOOLS)


def heavy_text(tokenizer, ids, weights):
    """The heavy tokens; a space stands for the others between them."""
    parts = "".join(tokenizer.decode([i]) if weight == HEAVY else "\0" for i, weight in zip(ids, weights, strict=True))
    return " ".join(part for part in parts.split("\0") if part)


@EVERY_DIALECT
def test_the_right_side_weighs_where_the_wrong_one_erred(speaking):
    tree = tree_of(speaking, *WRONG)
    ids = tree.completion_ids(0)
    found = {
        kind: heavy_text(speaking, ids, pair_weights(tree, pair, speaking, OPTIONS)[0])
        for kind, pair in zip(WRONG, tree.pairs, strict=True)
    }
    assert found["value"].strip("\"'") == "Oslo"
    assert "3" in found["missing"] and "days" in found["missing"] and "C" not in found["missing"]
    assert [part.strip("\"'") for part in found["two values"].split()] == ["3", "C"]
    assert found["tool"].strip("\"'") == "weather"
    assert "Oslo" in found["call"] and "weather" in found["call"]


@EVERY_DIALECT
@pytest.mark.parametrize(
    ("wrong", "behind"),
    [
        ({"name": "weather_now", "arguments": {"city": "Oslo", "days": 3, "unit": "C"}}, "weather"),
        ({"name": "weather", "arguments": {"city": "Oslo, Norway", "days": 3, "unit": "C"}}, "Oslo"),
        ({"name": "weather", "arguments": {"city": "Oslo", "days": 30, "unit": "C"}}, "3"),
    ],
)
def test_where_the_wrong_one_goes_on_the_right_side_weighs_behind_what_it_should_be(
    speaking, wrong, behind, monkeypatch
):
    monkeypatch.setitem(WRONG, "longer", [wrong])
    tree = tree_of(speaking, "longer")
    ids, weights = tree.completion_ids(0), pair_weights(tree, tree.pairs[0], speaking, OPTIONS)[0]
    fork = weights.index(HEAVY)
    assert weights == [1.0] * fork + [HEAVY] + [LIGHT] * (len(ids) - fork - 1)
    assert speaking.decode(ids[:fork]).endswith(behind)


@EVERY_DIALECT
def test_the_wrong_side_weighs_at_its_fork(speaking):
    tree = tree_of(speaking, *WRONG)
    for pair in tree.pairs:
        chosen, rejected = tree.completion_ids(0), tree.completion_ids(pair.rejected)
        fork = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        weights = pair_weights(tree, pair, speaking, OPTIONS)[1]
        assert weights == [1.0] * fork + [HEAVY] + [LIGHT] * (len(rejected) - fork - 1)


@EVERY_DIALECT
@pytest.mark.parametrize("weights_of", RULES.values(), ids=RULES)
def test_merging_prefixes_changes_no_weight(speaking, weights_of):
    merged = tree_of(speaking, *WRONG)
    for kind, pair in zip(WRONG, merged.pairs, strict=True):
        alone = tree_of(speaking, kind)
        assert weights_of(merged, pair, speaking) == weights_of(alone, alone.pairs[0], speaking)


@EVERY_DIALECT
@pytest.mark.parametrize("kind", ["value", "two values", "tool"])
def test_tokens_keep_their_weights_wherever_completions_are_cut(speaking, kind):
    tree = tree_of(speaking, kind)
    whole = pair_weights(tree, tree.pairs[0], speaking, OPTIONS)
    fork, last = (whole[1].index(HEAVY), max(i for i, weight in enumerate(whole[0]) if weight == HEAVY))
    for length in range(fork + 1, max(map(len, whole)) + 1):
        part = cut(tree, length)
        chosen, rejected = pair_weights(part, part.pairs[0], speaking, OPTIONS)
        assert rejected == whole[1][:length] and len(chosen) == len(whole[0][:length])
        assert chosen[: fork + 1] == whole[0][: fork + 1]
        if length > last + len("\n</parameter>\n"):  # what is heavy, and that it ends, can be read
            assert chosen == whole[0][:length]


@pytest.mark.parametrize("dialect", ["hermes"])
def test_a_tree_over_the_limit_is_left_out_and_never_cut(speaking):
    tree = tree_of(speaking, "value")
    longest = 1 + max(len(tree.completion_ids(leaf)) for leaf in range(2))
    before = tree.to_dict()
    for limit in (longest - 1, longest):
        assert Limits(limit, "drop").keep(tree, "line 1", DataReport("rows.jsonl", "rows")) == (limit == longest)
        assert tree.to_dict() == before


@EVERY_DIALECT
@pytest.mark.parametrize("token_weights", RULES)
def test_packing_gives_every_weight_to_its_token(speaking, token_weights):
    weights_of = RULES[token_weights]
    trees = [tree_of(speaking, *WRONG, name="all"), *(tree_of(speaking, kind, name=kind) for kind in WRONG)]
    examples = make_examples(
        trees,
        tokenizer=speaking,
        terms=[LossTerm("sigmoid")],
        options=LossOptions(),
        token_weights=token_weights,
        error_weights=OPTIONS,
    )
    pack = pack_trees(trees, terms=[Term([example.weights[0] for example in examples])])
    found = pack.terms[0].C.to_dense()
    starts = np.cumsum([0, *(sum(len(node.ids) for node in tree.nodes) for tree in trees)])
    row_of = {place: row for row, place in enumerate(pack.place_R[: pack.num_trained].tolist())}
    number = 0
    for start, tree in zip(starts[:-1], trees, strict=True):
        of_node = np.cumsum([start, *(len(node.ids) for node in tree.nodes)])
        for pair in tree.pairs:
            weights = weights_of(tree, pair, speaking)
            expected = np.zeros(len(row_of))
            for sign, leaf, side in ((1, pair.chosen, weights[0]), (-1, pair.rejected, weights[1])):
                places = [place for n in tree.path(leaf) for place in range(of_node[n], of_node[n + 1])]
                for place, weight in zip(places, side, strict=True):
                    if place in row_of:
                        expected[row_of[place]] += sign * weight
                    else:
                        assert place < start + len(tree.nodes[0].ids), "only what all sides share is not trained"
            assert found[number].tolist() == expected.tolist()
            number += 1
    assert number == len(found) == 2 * len(WRONG)
