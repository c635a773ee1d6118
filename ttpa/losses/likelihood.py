"""Weighted likelihood: the samples of one query, each as heavy as it is likely among them."""

from __future__ import annotations

import torch

from ttpa.losses.options import LossOptions
from ttpa.losses.rows import LossAndMetrics, Rows, mean


def likelihood(rows: Rows, options: LossOptions) -> LossAndMetrics:
    """`sum_i w_i H_i` over the leaves of a tree, summed over trees and divided by the number of trees: `H_i` is the
    mean negative log-likelihood of the tokens of leaf i that the model wrote and
    `w_i = softmax_i(-H_i / likelihood_temperature)` over the leaves of its tree, without a gradient, so that the lower
    loss weighs more. A "pair" is one leaf here. The M-step of EXSEARCH (arXiv 2505.20128) and DRO (arXiv 2505.03075),
    with weights by the current policy and temperature 1. We follow the papers: EXSEARCH's published code computes the
    softmax and then uses `H_i / sum_j H_j` over the device's batch, which weighs the worse sample more; DRO's
    multiplies the loss by a constant 1/4. The metrics are means over leaves: of H, and of `1 / sum_i w_i^2`
    of the leaf's tree, which is 1 where one leaf takes all."""
    assert rows.tree_P is not None
    loss_P = -(rows.chosen_PR @ rows.logp_R.double())
    score_P = -loss_P.detach() / options.likelihood_temperature
    same_PP = rows.tree_P[:, None] == rows.tree_P
    weight_PP = score_P.expand(same_PP.shape).masked_fill(~same_PP, -torch.inf).softmax(dim=1)
    effective_P = 1 / weight_PP.square().sum(dim=1)
    metrics = {"likelihood/nll": mean(loss_P), "likelihood/effective_leaves": mean(effective_P)}
    return rows.total(weight_PP.diagonal() * loss_P), metrics
