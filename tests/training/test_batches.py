from __future__ import annotations

import pytest
from random_trees import random_tree

from ttpa.esm.weights import WeightOptions
from ttpa.training.batches import epoch_batches, likelihood_examples, packs, plan_steps, preference_examples
from ttpa.trees.pack import packed_tokens
from ttpa.trees.record import Pair


def test_an_epoch_has_every_tree_once_in_an_order_of_its_own():
    num_pairs = [3, 1, 2, 5, 1, 1, 4, 2, 1]
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        batches = epoch_batches(num_pairs, batch_size=4, seed=seed, epoch=epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(9))
        for batch in batches[:-1]:
            pairs = [num_pairs[i] for i in batch]
            assert sum(pairs) >= 4 > sum(pairs[:-1])
        assert batches == epoch_batches(num_pairs, batch_size=4, seed=seed, epoch=epoch)
        orders.append([i for batch in batches for i in batch])
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize(
    ("max_steps", "epochs"), [(-1, [0.5, 1, 1.5, 2]), (3, [0.5, 1, 1.5]), (6, [0.5, 1, 1.5, 2, 2.5, 3])]
)
def test_steps_go_on_over_epochs(max_steps, epochs):
    steps = plan_steps([1] * 5, batch_size=4, num_epochs=2, max_steps=max_steps, seed=0)
    assert [epoch for epoch, _ in steps] == epochs
    assert [len(batch) for _, batch in steps] == [4, 1, 4, 1, 4, 1][: len(epochs)]


def test_chosen_leaves_count_once_and_nothing_else_is_packed():
    tree, no_pairs = random_tree(3, num_leaves=4), random_tree(4)
    tree.pairs = [Pair(2, 0), Pair(2, 1), Pair(3, 1)]
    no_pairs.pairs = []
    (example,) = likelihood_examples([tree, no_pairs])
    (pack,) = packs([example], pack_tokens=1000, average=False)
    lengths = [len(tree.completion_ids(leaf)) for leaf in (2, 3)]
    assert pack.C.sum(dim=1).to_dense().tolist() == lengths and pack.chosen_PR._nnz() == sum(lengths)
    nodes = {node for leaf in (2, 3) for node in tree.path(leaf)}
    assert len(pack.ids_T) == len(tree.prompt_ids) + sum(len(tree.nodes[node].ids) for node in nodes)


def test_packs_keep_the_budget(tokenizer):
    trees = [random_tree(seed) for seed in range(6)]
    examples = preference_examples(trees, tokenizer=tokenizer, options=WeightOptions())
    cut = packs(examples, pack_tokens=80, average=False)
    assert len(cut) > 1 and all(len(pack.ids_T) <= 80 for pack in cut)
    assert sum(len(pack.ids_T) for pack in cut) == sum(map(packed_tokens, trees))
    assert sorted(pair for pack in cut for pair in pack.pairs) == [
        (t.id, p) for t in trees for p in range(len(t.pairs))
    ]
