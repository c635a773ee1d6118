from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import random_tree

from ttpa.trees.pack import Term, completion_tokens, pack_trees, packed_tokens
from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions


def small_tree() -> PreferenceTree:
    nodes, leaves = merge_completions(Completion(ids, Leaf(0, "given")) for ids in ([3, 4, 5], [3, 6], [8, 9], [7]))
    return PreferenceTree("small", [1, 2], nodes, leaves, [Pair(0, 1, 0.25), Pair(0, 2)])


def rows_by_prefix(batch):
    """For each head row: the token ids that it sees, followed by the one that it predicts."""
    index = torch.arange(len(batch.ids_T))
    rows = []
    for row, target in zip(batch.row_R.tolist(), batch.target_R.tolist(), strict=True):
        seen = (index <= row) & (row < batch.end_T)
        rows.append((*batch.ids_T[seen].tolist(), target))
    return rows


def test_layout_of_a_small_tree():
    batch = pack_trees([small_tree(), small_tree()])
    assert batch.ids_T.tolist() == [1, 2, 3, 4, 5, 6, 8, 9] * 2  # the leaf [7] stands in no pair
    assert batch.position_T.tolist() == [0, 1, 2, 3, 4, 3, 2, 3] * 2
    end = [8, 8, 6, 5, 5, 6, 8, 8]
    assert batch.end_T.tolist() == end + [8 + e for e in end]
    assert (batch.tree_starts, batch.prompt_ends) == ([0, 8, 16], [2, 10])
    assert batch.pairs == [("small", 0), ("small", 1)] * 2
    assert batch.margin_P.tolist() == [0.25, 0.0] * 2


def test_matrix_of_a_small_tree():
    batch = pack_trees([small_tree()])
    row = {prefix: r for r, prefix in enumerate(rows_by_prefix(batch))}
    three, four, five = row[1, 2, 3], row[1, 2, 3, 4], row[1, 2, 3, 4, 5]
    six, eight, nine = row[1, 2, 3, 6], row[1, 2, 8], row[1, 2, 8, 9]
    expected = torch.zeros(2, 6, dtype=torch.float64)
    expected[0, [four, five]], expected[0, six] = 1, -1  # the shared token 3 cancels
    expected[1, [three, four, five]], expected[1, [eight, nine]] = 1, -1
    assert torch.equal(batch.C.to_dense(), expected)
    # the fork after token 3, and the one after the prompt, predict two tokens each
    assert batch.row_R[four] == batch.row_R[six] and batch.row_R[three] == batch.row_R[eight]


def test_a_row_that_cancels_everywhere_is_reported_but_not_trained():
    tree = small_tree()
    tree.pairs = tree.pairs[:1]
    batch = pack_trees([tree])
    assert batch.num_trained == 3
    assert rows_by_prefix(batch)[batch.num_trained :] == [(1, 2, 3)]
    assert batch.chosen_PR.to_dense().sum() == 3 and batch.rejected_PR.to_dense().sum() == 2


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, 10_000), min_size=1, max_size=4, unique=True), st.booleans(), st.booleans(), st.booleans()
)
def test_matrices_say_what_a_loop_over_completions_says(seeds, tools, weighted, sides):
    trees = [random_tree(seed, tools=tools) for seed in seeds]
    generator = torch.Generator().manual_seed(seeds[0])
    weights = None
    if weighted:
        weights = [
            [
                tuple(
                    torch.rand(len(tree.completion_ids(leaf)), generator=generator).tolist()
                    for leaf in (pair.chosen, pair.rejected)
                )
                for pair in tree.pairs
            ]
            for tree in trees
        ]
    batch = pack_trees(trees, terms=[Term(weights, sides=sides)])
    rows = rows_by_prefix(batch)
    # trees with equal prompts hold equal prefixes: the tree of a row keeps them apart
    starts = torch.tensor(batch.tree_starts[1:])
    tree_R = torch.searchsorted(starts, batch.row_R, right=True).tolist()
    column = {key: r for r, key in enumerate(zip(tree_R, rows, strict=True))}
    assert len(column) == len(rows)

    p, all_rows = 0, len(rows)
    for t, tree in enumerate(trees):
        for q, pair in enumerate(tree.pairs):
            expected = torch.zeros(all_rows, dtype=torch.float64)
            apart = torch.zeros(2, all_rows, dtype=torch.float64)
            for side, (leaf, sign) in enumerate(((pair.chosen, 1), (pair.rejected, -1))):
                ids, written = tree.completion_ids(leaf), tree.trained(leaf)
                weight = weights[t][q][side] if weights else written
                reported = (batch.chosen_PR, batch.rejected_PR)[side].to_dense()[p]
                for i in range(len(ids)):
                    key = (t, (*tree.prompt_ids, *ids[: i + 1]))
                    if weight[i]:
                        expected[column[key]] += sign * weight[i]
                        apart[side, column[key]] = weight[i]
                    if written[i]:
                        assert reported[column[key]] == 1
                assert reported.sum() == sum(written)
            trained = batch.C.to_dense()[p]
            torch.testing.assert_close(trained, expected[: batch.num_trained], rtol=1e-12, atol=1e-15)
            assert not expected[batch.num_trained :].any()  # what cancels, cancels exactly
            for side, matrix in enumerate((batch.terms[0].chosen_PR, batch.terms[0].rejected_PR)):
                assert torch.equal(matrix.to_dense()[p], apart[side, : batch.num_trained])
            assert not (sides and apart[:, batch.num_trained :].any())
            p += 1
    assert p == len(batch.pairs) == batch.C.shape[0]
    counts = batch.terms[0].chosen_PR + batch.terms[0].rejected_PR if sides else batch.C
    assert bool((counts.to_dense() != 0).any(dim=0).all())  # every trained row counts somewhere


def test_the_rows_of_several_terms_are_trained_together():
    tree = small_tree()
    tree.pairs = tree.pairs[:1]
    likelihood = [[([1.0, 1.0, 1.0], [0.0, 0.0])]]
    batch = pack_trees([tree], terms=[Term(), Term(likelihood)])
    row = {prefix: r for r, prefix in enumerate(rows_by_prefix(batch))}
    assert batch.num_trained == 4  # the shared token 3 cancels in the first term only
    margin, chosen = (term.C.to_dense()[0] for term in batch.terms)
    assert margin[row[1, 2, 3]] == 0 and chosen[row[1, 2, 3]] == 1
    assert margin[row[1, 2, 3, 6]] == -1 and chosen[row[1, 2, 3, 6]] == 0


def test_reference_log_probabilities_find_their_rows():
    trees = [small_tree(), random_tree(5)]
    places = [f"{tree.id} {n} {i}" for tree in trees for n, node in enumerate(tree.nodes) for i in range(len(node.ids))]
    logps = [[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0], [0.5 * i for i in range(completion_tokens(trees[1]))]]
    batch = pack_trees(trees, logps=logps)
    flat = torch.tensor([*logps[0], *logps[1]])
    assert len(flat) == len(places) and torch.equal(batch.ref_logp_R, flat[batch.place_R])
    tokens = torch.tensor([token for tree in trees for node in tree.nodes for token in node.ids])
    assert torch.equal(tokens[batch.place_R], batch.target_R)
    assert batch.tree_P.tolist() == [0] * 2 + [1] * len(trees[1].pairs)
    with pytest.raises(ValueError, match="7 completion tokens, and 3 log"):
        pack_trees([small_tree()], logps=[[0.0] * 3])


def test_all_weights_zero_leaves_no_trained_row():
    tree = small_tree()
    weights = [[([0.0] * 3, [0.0] * 2), ([0.0] * 3, [0.0] * 2)]]
    batch = pack_trees([tree], terms=[Term(weights)])
    assert batch.num_trained == 0 and tuple(batch.C.shape) == (2, 0)
    assert len(batch.row_R) == 6


def test_what_does_not_fit_is_refused():
    tree = small_tree()
    with pytest.raises(ValueError, match="2 trees, there are 1"):
        pack_trees([tree], terms=[Term([[], []])])
    with pytest.raises(ValueError, match="2 pairs, weights are given for 1"):
        pack_trees([tree], terms=[Term([[([1.0] * 3, [1.0] * 2)]])])
    with pytest.raises(ValueError, match="4 weights for 3 tokens of the chosen side"):
        pack_trees([tree], terms=[Term([[([1.0] * 4, [1.0] * 2), ([1.0] * 3, [1.0] * 2)]])])
    tree.pairs = []
    with pytest.raises(ValueError, match="'small' has no pairs"):
        pack_trees([tree])


def test_moving_keeps_everything():
    batch = pack_trees([small_tree()])
    moved = batch.to("cpu")
    assert torch.equal(moved.C.to_dense(), batch.C.to_dense()) and moved.pairs == batch.pairs


@settings(deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=4))
def test_packed_tokens_are_counted_without_packing(seeds):
    trees = [random_tree(seed) for seed in seeds]
    assert len(pack_trees(trees).ids_T) == sum(map(packed_tokens, trees))
