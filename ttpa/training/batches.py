"""Batches of whole trees, and the packs that one batch is cut into."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ttpa.esm.weights import WeightOptions, pair_weights
from ttpa.trees.pack import PairWeights, TreeBatch, pack_trees, plan_packs
from ttpa.trees.record import Pair, PreferenceTree


@dataclass(frozen=True)
class Example:
    """A tree with the token weights of its pairs."""

    tree: PreferenceTree
    weights: list[PairWeights]


def preference_examples(trees: Sequence[PreferenceTree], *, tokenizer: Any, options: WeightOptions) -> list[Example]:
    """The trees that have pairs, each pair with the weights that ESM's errors give its tokens; raises InputError for a
    tokenizer that `token_spans` cannot read."""
    return [
        Example(tree, [pair_weights(tree, pair, tokenizer, options) for pair in tree.pairs])
        for tree in trees
        if tree.pairs
    ]


def likelihood_examples(trees: Sequence[PreferenceTree]) -> list[Example]:
    """The trees that have pairs, for the likelihood of their chosen leaves: a leaf that several pairs prefer counts
    once. A leaf is paired with itself, so that its path alone is packed, and weighs 0 on the rejected side."""
    examples = []
    for tree in trees:
        leaves = sorted({pair.chosen for pair in tree.pairs})
        weights: list[PairWeights] = [(tree.trained(leaf), [0.0] * len(tree.trained(leaf))) for leaf in leaves]
        if leaves:
            examples.append(Example(replace(tree, pairs=[Pair(leaf, leaf) for leaf in leaves]), weights))
    return examples


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


def packs(
    examples: Sequence[Example], *, pack_tokens: int, average: bool, train_chosen: bool = False
) -> list[TreeBatch]:
    """The examples of one optimizer step in packs of at most `pack_tokens` tokens (a longer tree has a pack of its
    own); `average` and `train_chosen` are those of `pack_trees`."""
    trees = [example.tree for example in examples]
    return [
        pack_trees(
            [trees[i] for i in pack],
            weights=[examples[i].weights for i in pack],
            average=average,
            train_chosen=train_chosen,
        )
        for pack in plan_packs(trees, max_tokens=pack_tokens)
    ]
