"""Margins, accuracies and forks by the class of the tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ttpa.trees.classes import CLASSES
from ttpa.trees.pack import TreeBatch

SUMS = (
    *("pairs", "fork/pairs", "fork/margins", "fork/right"),
    *(f"{part}/{name}" for part in ("margins", "right", "pairs", "fork") for name in CLASSES),
)
"""The names of `class_sums`."""


def class_sums(
    pack: TreeBatch, class_N: np.ndarray, *, logp_R: torch.Tensor, ref_logp_R: torch.Tensor, beta: float
) -> dict[str, float]:
    """Sums over the pairs of a pack, named as in SUMS, that become metrics once packs and processes are added up.

    `class_N` are the `tree_classes` of the pack's trees one after the other; `logp_R` and `ref_logp_R` are
    log-probabilities in nats of all rows, trained and reported, and `beta * (logp - ref_logp)` their rewards.
    `margins/CLASS` is the reward of the chosen side's tokens of the class minus that of the rejected side's,
    `right/CLASS` the number of pairs in which it is above 0, `pairs/CLASS` the number of pairs whose sides differ in a
    token of the class. The fork of a pair is the first token in which its sides differ, where the model wrote it on
    both: `fork/margins` is the reward of the chosen token minus that of the rejected one, `fork/right` counts those
    above 0, `fork/CLASS` the pairs whose chosen token there has the class.
    """
    num_pairs, width = len(pack.pairs), len(CLASSES)
    difference = (pack.chosen_PR - pack.rejected_PR).cpu().coalesce()
    differs = difference.values() != 0
    pair_N, row_N = difference.indices()[:, differs].numpy()
    sign_N = difference.values()[differs].numpy()
    reward_R = beta * (logp_R.detach().double() - ref_logp_R.detach().double()).cpu().numpy()
    place_R = pack.place_R.cpu().numpy()
    class_R = class_N[place_R]

    cell_N = pair_N * width + class_R[row_N]
    size = num_pairs * width
    margin_PC = np.bincount(cell_N, sign_N * reward_R[row_N], minlength=size).reshape(num_pairs, width)
    present_PC = np.bincount(cell_N, minlength=size).reshape(num_pairs, width) > 0

    fork_P = np.full((2, num_pairs), -1)
    for side, taken_N in enumerate((sign_N > 0, sign_N < 0)):
        pairs, rows = pair_N[taken_N], row_N[taken_N]
        order = np.lexsort((place_R[rows], pairs))  # along a path places rise
        pairs, first = np.unique(pairs[order], return_index=True)
        fork_P[side, pairs] = rows[order][first]
    before_R = pack.row_R.cpu().numpy()
    chosen, rejected = fork_P[:, (fork_P >= 0).all(axis=0) & (before_R[fork_P[0]] == before_R[fork_P[1]])]
    fork_margin = reward_R[chosen] - reward_R[rejected]

    by_class = (
        margin_PC.sum(axis=0),
        (margin_PC > 0).sum(axis=0),
        present_PC.sum(axis=0),
        np.bincount(class_R[chosen], minlength=width),
    )
    totals = [num_pairs, len(chosen), fork_margin.sum(), (fork_margin > 0).sum()]
    return dict(zip(SUMS, np.concatenate([totals, *by_class]).tolist(), strict=True))


def class_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """What the log says of `class_sums`: `rewards/margins/CLASS`, means over all pairs, which add up to
    `rewards/margins`; `rewards/accuracies/CLASS`, the share of right ones among the pairs whose sides differ in the
    class; `fork/margins` and `fork/accuracies`, means over the pairs that have a fork, and `fork/shares/CLASS`, shares
    of all pairs. Classes in which no pair differs are left out."""
    metrics: dict[str, float] = {}
    for name in CLASSES:
        if sums[f"pairs/{name}"]:
            metrics[f"rewards/margins/{name}"] = sums[f"margins/{name}"] / sums["pairs"]
            metrics[f"rewards/accuracies/{name}"] = sums[f"right/{name}"] / sums[f"pairs/{name}"]
    if sums["fork/pairs"]:
        metrics["fork/margins"] = sums["fork/margins"] / sums["fork/pairs"]
        metrics["fork/accuracies"] = sums["fork/right"] / sums["fork/pairs"]
    for name in CLASSES:
        if sums[f"fork/{name}"]:
            metrics[f"fork/shares/{name}"] = sums[f"fork/{name}"] / sums["pairs"]
    return metrics
