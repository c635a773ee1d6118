from __future__ import annotations

import pytest

from ttpa.training.batches import epoch_batches, plan_steps


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
