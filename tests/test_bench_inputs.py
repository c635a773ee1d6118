"""Inputs of the benchmarks. This file needs no conftest: the dry run of `bench.gpu` runs it for the real tests."""

from __future__ import annotations

import pytest
import torch

from bench.inputs import HeadShape, make_pairs, peaked_head, tree_ends
from bench.ops import OPS
from bench.ops.linear_token_dpo import preference_loss
from bench.worker import by_importance

CPU = torch.device("cpu")


def test_predictions_are_as_peaked_as_those_of_a_trained_model():
    head = peaked_head(HeadShape(R=256, H=64, V=128256, dtype=torch.bfloat16), CPU)
    gradient_RV = (head.hidden_RH.float() @ head.weight_VH.float().T).softmax(dim=1)
    target_R1 = head.target_R[:, None]
    probability_R = gradient_RV.gather(1, target_R1)[:, 0]
    assert 0.03 < probability_R.quantile(0.05) < 0.2 and 0.8 < probability_R.quantile(0.95) < 0.99
    gradient_RV.scatter_add_(1, target_R1, -torch.ones_like(target_R1, dtype=torch.float32))
    tiles = gradient_RV.abs_().view(2, 128, 1002, 128).amax(dim=(1, 3)) > 2**-12
    assert 0.35 < tiles.float().mean() < 0.65


def test_pairs_cover_the_share_of_rows_that_was_asked_for():
    pairs = make_pairs(80, 4, share=0.4, device=CPU)
    assert pairs.counts_R.float().mean() == pytest.approx(0.4)
    C = pairs.matrix().to_dense()
    assert C.shape == (4, 80)
    for p, row_R in enumerate(C):
        chosen, rejected = row_R[20 * p : 20 * p + 10], row_R[20 * p + 10 : 20 * p + 20]
        assert chosen.sum() == 4 and rejected.sum() == -4 and row_R.abs().sum() == 8
        assert chosen.max() == 1 and chosen.min() == 0 and rejected.min() == -1 and rejected.max() == 0
    logp_R = torch.randn(80)
    margin_P = C @ logp_R
    loss = -torch.nn.functional.logsigmoid(0.1 * margin_P).mean()
    assert torch.allclose(preference_loss(logp_R, 0.0, pairs), loss)


def test_tokens_of_a_tree_see_their_prompt_and_their_own_branch():
    end = tree_ends(trees=2, prompt=2, branches=2, completion=1)
    sees = [[j for j in range(8) if j <= i < end[j]] for i in range(8)]
    assert sees == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [4], [4, 5], [4, 5, 6], [4, 5, 7]]


def test_case_names_are_unique_and_the_important_ones_come_first():
    for size in ("toy", "cpu", "gpu", "errors"):
        found = list(by_importance(OPS, size))
        assert [case.op for case in found[: len(OPS)]] == list(OPS)
        assert len({(case.op, case.name) for case in found}) == len(found)
        assert all((case.reference is None) == (size == "gpu") for case in found)
