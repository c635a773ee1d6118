"""Packing: many preference trees in one sequence of tokens, and their pairs in one sparse matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ttpa.trees.record import PreferenceTree

PairWeights = tuple[Sequence[float], Sequence[float]]
"""One weight per completion token of the chosen side, and one per token of the rejected side."""


@dataclass(frozen=True)
class Term:
    """What one term of a loss reads of every pair.

    `weights[t][p]` are the token weights of pair p of tree t; None means 1 for tokens that the model wrote and 0
    elsewhere. `sides` says that the loss looks at each side apart: a token that both share with equal weight then does
    not cancel.
    """

    weights: Sequence[Sequence[PairWeights]] | None = None
    sides: bool = False


@dataclass(frozen=True)
class TermRows:
    """The weights of one term over trained rows, sparse COO, float64, [P, num_trained]: of the chosen side, of the
    rejected side, and `C`, their difference without its zeros."""

    chosen_PR: torch.Tensor
    rejected_PR: torch.Tensor
    C: torch.Tensor

    def to(self, device: torch.device | str) -> TermRows:
        """The same weights on `device`."""
        return TermRows(*(matrix.to(device) for matrix in (self.chosen_PR, self.rejected_PR, self.C)))


@dataclass
class TreeBatch:
    """Trees packed one after the other, each in depth-first order.

    Token i sees token j iff `j <= i < end_T[j]`: the rule separates branches, separates trees, and is causal. Head
    row r predicts token `target_R[r]` from the hidden state at packed index `row_R[r]`; at a fork several rows share
    an index. The first `num_trained` rows carry the loss, those after them are only reported.

    `ids_T`, `position_T` (depth), `end_T` (where the subtree of a token ends), `row_R`, `target_R`: int64.
    `place_R`: int64, where the row's target stands among the completion tokens of all nodes of all trees, in order.
    `tree_starts`: offset of every tree, and T at the end. `prompt_ends`: offset of each tree's first completion token.
    `terms`: the weights of each term of the loss. `chosen_PR`, `rejected_PR` (sparse, over all rows): 1 for every token
    of that side that the model wrote. `margin_P`: float64, the margins of the pairs as stored in the trees. `tree_P`:
    int64, the tree of a pair. `pairs`: (tree id, index of the pair). `ref_logp_R`: fp32, what `pack_trees` was given.
    """

    ids_T: torch.Tensor
    position_T: torch.Tensor
    end_T: torch.Tensor
    tree_starts: list[int]
    prompt_ends: list[int]
    row_R: torch.Tensor
    target_R: torch.Tensor
    place_R: torch.Tensor
    num_trained: int
    terms: list[TermRows]
    chosen_PR: torch.Tensor
    rejected_PR: torch.Tensor
    margin_P: torch.Tensor
    tree_P: torch.Tensor
    pairs: list[tuple[str, int]]
    ref_logp_R: torch.Tensor | None = None

    @property
    def C(self) -> torch.Tensor:
        """The coefficients of the first term."""
        return self.terms[0].C

    def to(self, device: torch.device | str) -> TreeBatch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved, terms=[term.to(device) for term in self.terms])


def pack_trees(
    trees: Sequence[PreferenceTree],
    *,
    terms: Sequence[Term] = (Term(),),
    logps: Sequence[Sequence[float] | np.ndarray] | None = None,
) -> TreeBatch:
    """Pack trees and write the weights of their pairs as sparse matrices.

    Of a tree only the prompt and the completions that stand in a pair are packed. Row p of a term's C is `weights on
    the chosen side - weights on the rejected side`; a token that both sides share with equal weight cancels exactly,
    and gets no trained row unless a term has `sides`. `logps[t]` are the reference log-probabilities in nats of tree t,
    one for each completion token of all its nodes, in order of the nodes, NaN where it is not known; they become
    `ref_logp_R`. Raises ValueError for a tree without a prompt or without pairs and for weights and log-probabilities
    that do not fit the completions.
    """
    for number, term in enumerate(terms):
        if term.weights is not None and len(term.weights) != len(trees):
            raise ValueError(f"term {number} has weights for {len(term.weights)} trees, there are {len(trees)}")
    if logps is not None and len(logps) != len(trees):
        raise ValueError(f"log-probabilities are given for {len(logps)} trees, there are {len(trees)}")
    ids: list[int] = []
    before: list[int] = []  # packed index of the token that a token continues, -1 at the start of a tree
    position: list[int] = []
    end: list[int] = []
    written: list[int] = []
    place: list[int] = []
    tree_starts, prompt_ends, num_places = [0], [], 0
    pairs: list[tuple[str, int]] = []
    tree_of_pair: list[int] = []
    sides_P: list[tuple[np.ndarray, np.ndarray]] = []  # packed tokens of the chosen and of the rejected side

    for t, tree in enumerate(trees):
        if not tree.prompt_ids or not tree.pairs:
            raise ValueError(f"tree {tree.id!r} has no {'pairs' if tree.prompt_ids else 'prompt'}")
        start, prompt_end = len(ids), len(ids) + len(tree.prompt_ids)
        ids += tree.prompt_ids
        before += [-1, *range(start, prompt_end - 1)]
        position += range(prompt_end - start)
        written += [0] * (prompt_end - start)
        place += [-1] * (prompt_end - start)
        tokens_of: dict[int, np.ndarray] = {}
        subtree_end: dict[int, int] = {}
        first_place = np.cumsum([num_places, *(len(node.ids) for node in tree.nodes)]).tolist()
        for n in _paired_nodes(tree):
            node, first = tree.nodes[n], len(ids)
            last = prompt_end - 1 if node.parent < 0 else int(tokens_of[node.parent][-1])
            depth = position[last] + 1
            ids += node.ids
            before += [last, *range(first, len(ids) - 1)]
            position += range(depth, depth + len(node.ids))
            written += node.trained or [1] * len(node.ids)
            place += range(first_place[n], first_place[n] + len(node.ids))
            tokens_of[n], subtree_end[n] = np.arange(first, len(ids)), len(ids)
        for n in reversed(tokens_of):
            parent = tree.nodes[n].parent
            if parent >= 0:
                subtree_end[parent] = max(subtree_end[parent], subtree_end[n])
        end += [len(ids)] * (prompt_end - start)
        for n, tokens in tokens_of.items():
            end += [subtree_end[n]] * len(tokens)
        paths = {
            leaf: np.concatenate([tokens_of[n] for n in tree.path(leaf)])
            for leaf in {leaf for pair in tree.pairs for leaf in (pair.chosen, pair.rejected)}
        }
        sides_P += [(paths[pair.chosen], paths[pair.rejected]) for pair in tree.pairs]
        pairs += [(tree.id, p) for p in range(len(tree.pairs))]
        tree_of_pair += [t] * len(tree.pairs)
        tree_starts.append(len(ids))
        prompt_ends.append(prompt_end)
        num_places = first_place[-1]

    written_T, before_T, place_T = np.array(written, dtype=bool), np.array(before), np.array(place)
    weights_K = [_weights(term, trees, sides_P, written_T) for term in terms]
    coefficients_K = [
        [_coefficients(sides, weights) for sides, weights in zip(sides_P, weights_P, strict=True)]
        for weights_P in weights_K
    ]
    trained = _union(
        [
            tokens
            for term, weights_P, coefficients_P in zip(terms, weights_K, coefficients_K, strict=True)
            for tokens in (
                [
                    side[weight != 0]
                    for sides, both in zip(sides_P, weights_P, strict=True)
                    for side, weight in zip(sides, both, strict=True)
                ]
                if term.sides
                else [tokens for tokens, _ in coefficients_P]
            )
        ]
    )
    written_P = [[side[written_T[side]] for side in sides] for sides in sides_P]
    reported = np.setdiff1d(_union([side for sides in written_P for side in sides]), trained)
    tokens_R = np.concatenate([trained, reported])
    column_T = np.full(len(ids), -1)
    column_T[tokens_R] = np.arange(len(tokens_R))

    def matrix(rows: Sequence[tuple[np.ndarray, np.ndarray]], width: int) -> torch.Tensor:
        pair_N = np.repeat(np.arange(len(rows)), [len(tokens) for tokens, _ in rows])
        column_N = column_T[np.concatenate([np.zeros(0, dtype=np.int64), *(tokens for tokens, _ in rows)])]
        value_N = np.concatenate([np.zeros(0), *(values for _, values in rows)])
        kept_N = (value_N != 0) & (column_N >= 0) & (column_N < width)
        index = torch.from_numpy(np.stack([pair_N[kept_N], column_N[kept_N]]))
        size = (len(rows), width)
        return torch.sparse_coo_tensor(index, torch.from_numpy(value_N[kept_N]), size, check_invariants=True).coalesce()

    def side_matrix(weights_P: Sequence[PairArrays], side: int) -> torch.Tensor:
        return matrix([(sides_P[p][side], weights[side]) for p, weights in enumerate(weights_P)], len(trained))

    ones_P = [[(side, np.ones(len(side))) for side in sides] for sides in written_P]
    ref_logp_R = None
    if logps is not None:
        ref_logp_R = torch.from_numpy(_concatenated(logps, trees)[place_T[tokens_R]])
    return TreeBatch(
        ids_T=torch.tensor(ids),
        position_T=torch.tensor(position),
        end_T=torch.tensor(end),
        tree_starts=tree_starts,
        prompt_ends=prompt_ends,
        row_R=torch.from_numpy(before_T[tokens_R]),
        target_R=torch.from_numpy(np.array(ids, dtype=np.int64)[tokens_R]),
        place_R=torch.from_numpy(place_T[tokens_R]),
        num_trained=len(trained),
        terms=[
            TermRows(side_matrix(weights_P, 0), side_matrix(weights_P, 1), matrix(coefficients_P, len(trained)))
            for weights_P, coefficients_P in zip(weights_K, coefficients_K, strict=True)
        ],
        chosen_PR=matrix([chosen for chosen, _ in ones_P], len(tokens_R)),
        rejected_PR=matrix([rejected for _, rejected in ones_P], len(tokens_R)),
        margin_P=torch.tensor([pair.margin for tree in trees for pair in tree.pairs], dtype=torch.float64),
        tree_P=torch.tensor(tree_of_pair),
        pairs=pairs,
        ref_logp_R=ref_logp_R,
    )


def completion_tokens(tree: PreferenceTree) -> int:
    """Number of completion tokens of a tree, over all its nodes."""
    return sum(len(node.ids) for node in tree.nodes)


def packed_tokens(tree: PreferenceTree) -> int:
    """Number of tokens that `pack_trees` stores for a tree."""
    return len(tree.prompt_ids) + sum(len(tree.nodes[n].ids) for n in _paired_nodes(tree))


def _paired_nodes(tree: PreferenceTree) -> list[int]:
    """Nodes on the way to a leaf that stands in a pair, in depth-first order."""
    leaves = {leaf for pair in tree.pairs for leaf in (pair.chosen, pair.rejected)}
    return sorted({n for leaf in leaves for n in tree.path(leaf)})


PairArrays = tuple[np.ndarray, np.ndarray]


def _weights(
    term: Term,
    trees: Sequence[PreferenceTree],
    sides_P: Sequence[PairArrays],
    written_T: np.ndarray,
) -> list[PairArrays]:
    """The weights of a term, float64, for each pair."""
    if term.weights is None:
        return [
            (written_T[chosen].astype(np.float64), written_T[rejected].astype(np.float64))
            for chosen, rejected in sides_P
        ]
    found: list[PairArrays] = []
    for tree, given in zip(trees, term.weights, strict=True):
        if len(given) != len(tree.pairs):
            raise ValueError(f"tree {tree.id!r} has {len(tree.pairs)} pairs, weights are given for {len(given)}")
        for p, weights in enumerate(given):
            for name, side, weight in zip(("chosen", "rejected"), sides_P[len(found)], weights, strict=True):
                if len(weight) != len(side):
                    raise ValueError(
                        f"tree {tree.id!r}, pair {p}: {len(weight)} weights for {len(side)} tokens of the {name} side"
                    )
            chosen, rejected = (np.asarray(weight, dtype=np.float64) for weight in weights)
            found.append((chosen, rejected))
    return found


def _concatenated(logps: Sequence[Sequence[float] | np.ndarray], trees: Sequence[PreferenceTree]) -> np.ndarray:
    for given, tree in zip(logps, trees, strict=True):
        if len(given) != completion_tokens(tree):
            raise ValueError(
                f"tree {tree.id!r} has {completion_tokens(tree)} completion tokens, and {len(given)} log-probabilities "
                "are given"
            )
    return np.concatenate([np.asarray(given, dtype=np.float32) for given in logps])


def _coefficients(sides: PairArrays, weights: PairArrays) -> PairArrays:
    """Packed tokens of one pair and their coefficients, without those that cancel."""
    tokens, column = np.unique(np.concatenate(sides), return_inverse=True)
    value = np.bincount(column, np.concatenate([weights[0], -weights[1]]), minlength=len(tokens))
    return tokens[value != 0], value[value != 0]


def _union(parts: list[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *parts]))
