"""Packing: many preference trees in one sequence of tokens, and their pairs in one sparse matrix."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ttpa.trees.record import PreferenceTree

PairWeights = tuple[Sequence[float], Sequence[float]]


@dataclass
class TreeBatch:
    """Trees packed one after the other, each in depth-first order.

    Token i sees token j iff `j <= i < end_T[j]`: the rule separates branches, separates trees, and is causal. Head
    row r predicts token `target_R[r]` from the hidden state at packed index `row_R[r]`; at a fork several rows share
    an index. The first `num_trained` rows carry the loss, those after them are only reported.

    `ids_T`, `position_T` (depth), `end_T` (where the subtree of a token ends), `row_R`, `target_R`: int64.
    `tree_starts`: offset of every tree, and T at the end. `prompt_ends`: offset of each tree's first completion token.
    `C [P, num_trained]`: sparse COO, float64, the coefficient of each trained row in the margin of each pair.
    `chosen_PR`, `rejected_PR` (sparse, over all rows): 1 for every token of that side that the model wrote.
    `margin_P`: float64, the margins of the pairs as stored in the trees. `pairs`: (tree id, index of the pair).
    """

    ids_T: torch.Tensor
    position_T: torch.Tensor
    end_T: torch.Tensor
    tree_starts: list[int]
    prompt_ends: list[int]
    row_R: torch.Tensor
    target_R: torch.Tensor
    C: torch.Tensor
    chosen_PR: torch.Tensor
    rejected_PR: torch.Tensor
    margin_P: torch.Tensor
    pairs: list[tuple[str, int]]

    @property
    def num_trained(self) -> int:
        """Number of head rows that carry the loss."""
        return self.C.shape[1]

    @property
    def chosen_rows(self) -> torch.Tensor:
        """The trained rows of chosen completions, each once, in order."""
        columns = self.chosen_PR.indices()[1].unique()
        return columns[columns < self.num_trained]

    def to(self, device: torch.device | str) -> TreeBatch:
        """The same batch with its tensors on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


def pack_trees(
    trees: Sequence[PreferenceTree],
    *,
    weights: Sequence[Sequence[PairWeights]] | None = None,
    average: bool = False,
    train_chosen: bool = False,
) -> TreeBatch:
    """Pack trees and write the margins of their pairs as one sparse matrix.

    Of a tree only the prompt and the completions that stand in a pair are packed. `weights[t][p]` holds, for pair p
    of tree t, one weight per completion token of the chosen side and one per token of the rejected side; None means
    1 for tokens that the model wrote and 0 elsewhere. Row p of C is `weights on the chosen side - weights on the
    rejected side`; a token that both sides share with equal weight cancels exactly and gets no trained row. With
    `average` each side is divided by its total weight first (length-normalised losses such as IPO), so shared tokens
    cancel only between sides of equal total. With `train_chosen` every token of a chosen side that the model wrote
    has a trained row, for a likelihood term beside the margins. Raises ValueError for a tree without a prompt or
    without pairs and for weights that do not fit the completions.
    """
    if weights is not None and len(weights) != len(trees):
        raise ValueError(f"weights are given for {len(weights)} trees, there are {len(trees)}")
    ids: list[int] = []
    before: list[int] = []  # packed index of the token that a token continues, -1 at the start of a tree
    position: list[int] = []
    end: list[int] = []
    written: list[int] = []
    tree_starts, prompt_ends = [0], []
    pairs: list[tuple[str, int]] = []
    margins: list[float] = []
    entries: list[tuple[np.ndarray, ...]] = []  # for each pair: tokens and weights of chosen, of rejected

    for t, tree in enumerate(trees):
        if not tree.prompt_ids or not tree.pairs:
            raise ValueError(f"tree {tree.id!r} has no {'pairs' if tree.prompt_ids else 'prompt'}")
        if weights is not None and len(weights[t]) != len(tree.pairs):
            raise ValueError(f"tree {tree.id!r} has {len(tree.pairs)} pairs, weights are given for {len(weights[t])}")
        start, prompt_end = len(ids), len(ids) + len(tree.prompt_ids)
        ids += tree.prompt_ids
        before += [-1, *range(start, prompt_end - 1)]
        position += range(prompt_end - start)
        written += [0] * (prompt_end - start)
        tokens_of: dict[int, range] = {}
        for n in _paired_nodes(tree):
            node = tree.nodes[n]
            tokens = range(len(ids), len(ids) + len(node.ids))
            last = prompt_end - 1 if node.parent < 0 else tokens_of[node.parent][-1]
            ids += node.ids
            before += [last, *tokens[:-1]]
            position += range(position[last] + 1, position[last] + 1 + len(tokens))
            written += node.trained or [1] * len(tokens)
            tokens_of[n] = tokens
        subtree_end = {n: tokens.stop for n, tokens in tokens_of.items()}
        for n in reversed(tokens_of):
            parent = tree.nodes[n].parent
            if parent >= 0:
                subtree_end[parent] = max(subtree_end[parent], subtree_end[n])
        end += [len(ids)] * (prompt_end - start)
        for n, tokens in tokens_of.items():
            end += [subtree_end[n]] * len(tokens)

        for p, pair in enumerate(tree.pairs):
            entry: list[np.ndarray] = []
            for side, leaf in enumerate((pair.chosen, pair.rejected)):
                path = np.concatenate([np.arange(tokens_of[n].start, tokens_of[n].stop) for n in tree.path(leaf)])
                given = tree.trained(leaf) if weights is None else weights[t][p][side]
                weight = np.asarray(given, dtype=np.float64)
                if weight.shape != path.shape:
                    raise ValueError(
                        f"tree {tree.id!r}, pair {p}: {len(weight)} weights for {len(path)} tokens of the "
                        f"{('chosen', 'rejected')[side]} side"
                    )
                if average and weight.sum() > 0:
                    weight = weight / weight.sum()
                entry += [path, weight]
            entries.append(tuple(entry))
            pairs.append((tree.id, p))
            margins.append(pair.margin)
        tree_starts.append(len(ids))
        prompt_ends.append(prompt_end)

    written_T = np.array(written, dtype=bool)
    coefficient_P = [_coefficients(*entry) for entry in entries]
    sides_P = [[path[written_T[path]] for path in (entry[0], entry[2])] for entry in entries]
    chosen_P = [chosen for chosen, _ in sides_P] if train_chosen else []
    trained = _union([tokens for tokens, _ in coefficient_P] + chosen_P)
    reported = np.setdiff1d(_union([tokens for sides in sides_P for tokens in sides]), trained)
    tokens_R = np.concatenate([trained, reported])
    column_T = np.zeros(len(ids), dtype=np.int64)
    column_T[tokens_R] = np.arange(len(tokens_R))

    def matrix(rows: list[tuple[np.ndarray, np.ndarray]], width: int) -> torch.Tensor:
        pair_N = np.repeat(np.arange(len(rows)), [len(tokens) for tokens, _ in rows])
        column_N = column_T[np.concatenate([np.zeros(0, dtype=np.int64), *(tokens for tokens, _ in rows)])]
        value_N = np.concatenate([np.zeros(0), *(values for _, values in rows)])
        index = torch.from_numpy(np.stack([pair_N, column_N]))
        size = (len(rows), width)
        return torch.sparse_coo_tensor(index, torch.from_numpy(value_N), size, check_invariants=True).coalesce()

    return TreeBatch(
        ids_T=torch.tensor(ids),
        position_T=torch.tensor(position),
        end_T=torch.tensor(end),
        tree_starts=tree_starts,
        prompt_ends=prompt_ends,
        row_R=torch.from_numpy(np.array(before, dtype=np.int64)[tokens_R]),
        target_R=torch.from_numpy(np.array(ids, dtype=np.int64)[tokens_R]),
        C=matrix(coefficient_P, len(trained)),
        chosen_PR=matrix([(chosen, np.ones(len(chosen))) for chosen, _ in sides_P], len(tokens_R)),
        rejected_PR=matrix([(rejected, np.ones(len(rejected))) for _, rejected in sides_P], len(tokens_R)),
        margin_P=torch.tensor(margins, dtype=torch.float64),
        pairs=pairs,
    )


def packed_tokens(tree: PreferenceTree) -> int:
    """Number of tokens that `pack_trees` stores for a tree."""
    return len(tree.prompt_ids) + sum(len(tree.nodes[n].ids) for n in _paired_nodes(tree))


def plan_packs(trees: Sequence[PreferenceTree], *, max_tokens: int) -> list[list[int]]:
    """Group trees into packs of at most `max_tokens` tokens: best fit, longest tree first, deterministic.

    Returns indexes into `trees`, ascending within a pack, packs in order of their first tree. A tree longer than
    `max_tokens` gets a pack of its own; a tree without pairs is in no pack.
    """
    sizes = [packed_tokens(tree) for tree in trees]
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for i in sorted((i for i, tree in enumerate(trees) if tree.pairs), key=lambda i: (-sizes[i], i)):
        at = bisect_left(free, (sizes[i], -1))
        left, pack = free.pop(at) if at < len(free) else (max_tokens, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(i)
        insort(free, (left - sizes[i], pack))
    return sorted(sorted(pack) for pack in packs)


def _paired_nodes(tree: PreferenceTree) -> list[int]:
    """Nodes on the way to a leaf that stands in a pair, in depth-first order."""
    leaves = {leaf for pair in tree.pairs for leaf in (pair.chosen, pair.rejected)}
    return sorted({n for leaf in leaves for n in tree.path(leaf)})


def _coefficients(
    chosen: np.ndarray, chosen_weight: np.ndarray, rejected: np.ndarray, rejected_weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Packed tokens of one pair and their coefficients, without those that cancel."""
    tokens, column = np.unique(np.concatenate([chosen, rejected]), return_inverse=True)
    value = np.bincount(column, np.concatenate([chosen_weight, -rejected_weight]), minlength=len(tokens))
    return tokens[value != 0], value[value != 0]


def _union(parts: list[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *parts]))
