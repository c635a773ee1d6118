from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6)


def tree_of(completions: list[list[int]]) -> PreferenceTree:
    nodes, leaves = merge_completions(Completion(ids, Leaf(0, "given")) for ids in completions)
    return PreferenceTree("t", [7], nodes, leaves, [])


@given(st.lists(tokens, min_size=1, max_size=8, unique_by=tuple))
def test_merging_keeps_every_completion_and_stores_shared_prefixes_once(completions):
    tree = tree_of(completions)
    assert [tree.completion_ids(leaf) for leaf in range(len(tree.leaves))] == completions
    prefixes = {tuple(ids[:n]) for ids in completions for n in range(1, len(ids) + 1)}
    assert sum(len(node.ids) for node in tree.nodes) == len(prefixes)


@given(st.lists(tokens, min_size=1, max_size=8, unique_by=tuple))
def test_nodes_stand_in_depth_first_order_and_no_run_could_be_longer(completions):
    tree = tree_of(completions)
    path = [-1]
    for i, node in enumerate(tree.nodes):
        assert node.parent in path
        path = [*path[: path.index(node.parent) + 1], i]
    ends = {leaf.node for leaf in tree.leaves}
    for i in range(len(tree.nodes)):
        assert i in ends or sum(node.parent == i for node in tree.nodes) >= 2


def test_what_the_sampler_knew_follows_its_tokens():
    nodes, _ = merge_completions(
        [
            Completion(
                [1, 2, 3], Leaf(0, "trunk"), logps=[-1.0, -2.0, -3.0], entropy=[0.1, 0.2, 0.3], trained=[1, 1, 0]
            ),
            Completion([1, 4], Leaf(0, "branch"), logps=[-9.0, -4.0]),
        ]
    )
    assert [node.ids for node in nodes] == [[1], [2, 3], [4]]
    assert [node.logps for node in nodes] == [[-1.0], [-2.0, -3.0], [-4.0]]
    assert [node.entropy for node in nodes] == [[0.1], [0.2, 0.3], None]
    assert [node.trained for node in nodes] == [None, [1, 0], None]


def test_empty_and_equal_completions_are_refused():
    with pytest.raises(ValueError, match="empty"):
        tree_of([[1], []])
    with pytest.raises(ValueError, match="0 and 2 are equal"):
        tree_of([[1], [2], [1]])


def test_dict_round_trip():
    tree = tree_of([[1, 2], [1, 3]])
    tree.pairs = [Pair(0, 1, 0.5)]
    assert PreferenceTree.from_dict(tree.to_dict()) == tree
    with pytest.raises(TypeError):
        PreferenceTree.from_dict({**tree.to_dict(), "colour": 1})
