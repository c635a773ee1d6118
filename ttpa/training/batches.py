"""Which trees an optimizer step takes."""

from __future__ import annotations

import random
from collections.abc import Sequence


def epoch_batches(num_pairs: Sequence[int], *, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indexes of trees for the optimizer steps of one epoch, in an order that `seed` and `epoch` alone decide.

    `num_pairs[i]` is the number of pairs of tree i. Whole trees are taken until a batch has `batch_size` pairs or
    more; the last batch is kept however short it is.
    """
    order = list(range(len(num_pairs)))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    batches: list[list[int]] = []
    room = 0
    for i in order:
        if room <= 0:
            batches.append([])
            room = batch_size
        batches[-1].append(i)
        room -= num_pairs[i]
    return batches


def plan_steps(
    num_pairs: Sequence[int], *, batch_size: int, num_epochs: int, max_steps: int, seed: int
) -> list[tuple[float, list[int]]]:
    """The optimizer steps of a round: for each one the epochs that are done after it, and the indexes of its trees;
    `num_epochs` epochs long, or `max_steps` steps where this is not -1."""
    steps: list[tuple[float, list[int]]] = []
    epoch = 0
    while len(steps) < max_steps if max_steps >= 0 else epoch < num_epochs:
        batches = epoch_batches(num_pairs, batch_size=batch_size, seed=seed, epoch=epoch)
        steps += [(epoch + done / len(batches), batch) for done, batch in enumerate(batches, start=1)]
        epoch += 1
    return steps if max_steps < 0 else steps[:max_steps]
