"""Training examples: trees, and what each token of their pairs weighs in every term of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ttpa.errors import InputError
from ttpa.esm.weights import WeightOptions, key_token_weights, pair_weights
from ttpa.losses import Leaves, LossOptions, LossTerm, describe, packed_leaves
from ttpa.losses import token_weights as weights_of_loss
from ttpa.tools.dialects import DIALECTS
from ttpa.tools.dialects.detect import dialect_of
from ttpa.trees.pack import PairWeights
from ttpa.trees.record import Pair, PreferenceTree

TokenWeights = Literal["errors", "keys", "ones"]


@dataclass(frozen=True)
class Example:
    """A tree with the token weights of its pairs, `[term][pair]`, and, where they are known, of all its completion
    tokens in node order, the reference's log-probabilities (fp32, NaN where unknown) and the `tree_classes` (int8)."""

    tree: PreferenceTree
    weights: list[list[PairWeights]]
    logps: np.ndarray | None = None
    classes: np.ndarray | None = None


def make_examples(
    trees: Sequence[PreferenceTree],
    *,
    tokenizer: Any,
    terms: Sequence[LossTerm],
    options: LossOptions,
    token_weights: TokenWeights | None,
    error_weights: WeightOptions,
    scores: Sequence[Sequence[PairWeights]] | None = None,
) -> list[Example]:
    """The trees that have something to train on, with the weights of their tokens in every term.

    A term starts from `token_weights`, or its own choice where that is None: "errors" are those of ESM's errors
    (`pair_weights` with `error_weights`), "keys" those of `key_token_weights`, "ones" 1; all are 0 where the model did
    not write the token. The loss then changes them, see `ttpa.losses.token_weights`; sft and likelihood start from ones
    whatever is asked for. `scores[t][p]` are the token scores of helper models for pair p of tree t. Where no term
    needs the rejected sides a tree's pairs become (leaf, leaf), one for each chosen leaf, and for likelihood one for
    each leaf. Raises InputError for terms that cannot be trained together, for a loss that needs scores and has none,
    for keys in a dialect that is read without places, and as `read_completion` does.
    """
    if token_weights == "keys" and dialect_of(tokenizer).name not in DIALECTS:
        raise InputError(
            "--token_weights keys needs to know where a call stands, and the calls of this model are read without "
            f"places; that is known in the dialects {', '.join(DIALECTS)}"
        )
    leaves = packed_leaves(terms)
    bases: dict[TokenWeights, Callable[[PreferenceTree, Pair], PairWeights]] = {
        "errors": lambda tree, pair: pair_weights(tree, pair, tokenizer, error_weights),
        "keys": lambda tree, pair: key_token_weights(tree, pair, tokenizer),
        "ones": lambda tree, pair: (tree.trained(pair.chosen), tree.trained(pair.rejected)),
    }
    examples = []
    for t, tree in enumerate(trees):
        tree = replace(tree, pairs=_packed_pairs(tree, leaves))
        if not tree.pairs:
            continue
        weights: list[list[PairWeights]] = []
        for term in terms:
            loss = describe(term.name)
            base = bases[(token_weights or loss.base) if loss.leaves == "pairs" else "ones"]
            weights.append(
                [
                    weights_of_loss(
                        term.name,
                        tree=tree,
                        pair=pair,
                        base=base(tree, pair),
                        options=options,
                        scores=None if scores is None else scores[t][p],
                    )
                    for p, pair in enumerate(tree.pairs)
                ]
            )
        examples.append(Example(tree, weights))
    return examples


def denominators(examples: Sequence[Example], *, terms: Sequence[LossTerm]) -> list[float]:
    """What the loss of each term is divided by over the examples of a step, trees split or not: the number of pairs,
    the weight of all chosen tokens, or the number of trees (of which none is split then); at least 1, as nothing is to
    be divided where there is none."""
    totals: list[float] = []
    for k, term in enumerate(terms):
        per = describe(term.name).per
        if per == "token":
            total = math.fsum(math.fsum(chosen) for example in examples for chosen, _ in example.weights[k])
        else:
            total = sum(len(example.tree.pairs) for example in examples) if per == "pair" else len(examples)
        totals.append(float(total) or 1.0)
    return totals


def _packed_pairs(tree: PreferenceTree, leaves: Leaves) -> list[Pair]:
    if leaves == "pairs":
        return tree.pairs
    if leaves == "chosen":
        return [Pair(leaf, leaf) for leaf in sorted({pair.chosen for pair in tree.pairs})]
    # a leaf that the model wrote nothing of has no likelihood that could be compared with the others'
    return [Pair(leaf, leaf) for leaf in range(len(tree.leaves)) if any(tree.trained(leaf))]
