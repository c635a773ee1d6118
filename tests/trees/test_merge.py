"""Trees of one prompt as one tree."""

from __future__ import annotations

from ttpa.trees.merge import MOST_PAIRS, merge_trees
from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions


def row(id, chosen, *rejected, prompt=(1, 2), errors=(), trained=None, tools=()):
    sides = [Completion(list(ids), Leaf(-1, "given"), trained=trained) for ids in (chosen, *rejected)]
    for side in sides[1:]:
        side.leaf.errors = list(errors)
    nodes, leaves = merge_completions(sides)
    pairs = [Pair(0, leaf) for leaf in range(1, len(leaves))]
    return PreferenceTree(id, list(prompt), nodes, leaves, pairs, tools=list(tools), origin={"line": int(id)})


def sides(trees):
    return [
        (tree.prompt_ids, tree.completion_ids(pair.chosen), tree.completion_ids(pair.rejected))
        for tree in trees
        for pair in tree.pairs
    ]


def test_rows_of_one_prompt_share_it_and_keep_their_pairs():
    rows = [row("1", [5, 6, 7], [5, 8]), row("2", [9], [4], prompt=[3]), row("3", [5, 6, 7], [5, 6, 9])]
    first, second = merge_trees(rows)
    assert second is rows[1]
    assert first.id == "1" and first.origin == {"line": 1, "merged": ["3"]}
    assert len(first.leaves) == 3 and sum(len(node.ids) for node in first.nodes) == 5
    assert sorted(sides([first, second])) == sorted(sides(rows))


def test_the_same_pair_twice_stays_two_pairs():
    (tree,) = merge_trees([row("1", [5], [6]), row("2", [5], [6]), row("3", [7], [5])])
    assert sides([tree]) == [([1, 2], [5], [6]), ([1, 2], [5], [6]), ([1, 2], [7], [5])]
    assert tree.origin["merged"] == ["2", "3"]


def test_trees_that_differ_in_more_than_their_answers_stay_apart():
    rows = [
        row("1", [5, 6], [5, 7]),
        row("2", [5, 6], [8], tools=[{"name": "f"}]),
        row("3", [5, 8], [5, 7], errors=[{"code": "no_call"}]),  # the error is not in the first
        row("4", [5, 8], [5, 9], trained=[0, 1]),  # and here the model did not write the 5
    ]
    assert [tree.id for tree in merge_trees(rows)] == ["1", "2", "3", "4"]


def test_one_prompt_does_not_fill_a_step():
    rows = [row(str(i), [5], [10 + i]) for i in range(2 * MOST_PAIRS + 1)]
    merged = merge_trees(rows)
    assert [len(tree.pairs) for tree in merged] == [MOST_PAIRS, MOST_PAIRS, 1]
    assert sides(merged) == sides(rows)
