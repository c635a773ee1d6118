from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from random_trees import random_tree
from ttpa_kernels.linear_logp.reference import linear_logp_reference
from ttpa_kernels.token_dpo.pairs import PairMatrix

from ttpa.losses import LossOptions, linear_token_dpo_loss, pair_metrics, token_dpo_loss, token_weights
from ttpa.trees.pack import Term, pack_trees

LOSSES = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "label_smoothing": 0.1},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "hinge"},
    {"loss_type": "ipo"},
    {"loss_type": "linear"},
]


def loop_loss(logp, ref_logp, C, *, beta=0.1, loss_type="sigmoid", label_smoothing=0.0, margin=None, u=None):
    """The slow twin: one pair and one row at a time."""
    total = 0.0
    for p in range(C.shape[0]):
        x = 0.0 if margin is None else float(margin[p])
        for r in range(C.shape[1]):
            x = x + beta * float(C[p, r]) * (logp[r].double() - float(ref_logp[r]))
        if loss_type == "sigmoid":
            sigmoid = 1 / (1 + torch.exp(-x))
            f = -(1 - label_smoothing) * torch.log(sigmoid) - label_smoothing * torch.log(1 - sigmoid)
        elif loss_type == "robust":
            sigmoid = 1 / (1 + torch.exp(-x))
            clean, flipped = -torch.log(sigmoid), -torch.log(1 - sigmoid)
            f = ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)
        elif loss_type == "hinge":
            f = torch.clamp(1 - x, min=0)
        elif loss_type == "linear":
            f = -x
        else:
            f = (x / beta - 1 / (2 * beta)) ** 2
        total = total + (1.0 if u is None else float(u[p])) * f
    return total / C.shape[0]


def means(trees):
    """Weights that make the margin of a pair a difference of means over its sides, as IPO wants it."""
    return [
        [
            token_weights(
                "ipo",
                tree=tree,
                pair=pair,
                base=(tree.trained(pair.chosen), tree.trained(pair.rejected)),
                options=LossOptions(),
            )
            for pair in tree.pairs
        ]
        for tree in trees
    ]


def case(seeds=range(3), average=False):
    trees = [random_tree(seed, tools=True) for seed in seeds]
    batch = pack_trees(trees, terms=[Term(means(trees) if average else None)])
    generator = torch.Generator().manual_seed(0)
    logp = -3 * torch.rand(batch.num_trained, generator=generator)
    ref_logp = -3 * torch.rand(batch.num_trained, generator=generator)
    return batch, logp.requires_grad_(), ref_logp


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("options", LOSSES)
def test_equals_the_loop(options, average):
    batch, logp, ref_logp = case(average=average)
    margin, u = torch.rand(len(batch.pairs)) - 0.5, torch.rand(len(batch.pairs)) + 0.5
    loss, metrics = token_dpo_loss(
        logp_R=logp, ref_logp_R=ref_logp, C=batch.C, beta=0.3, margin_P=margin, pair_weight_P=u, **options
    )
    dense = batch.C.to_dense()
    want = loop_loss(logp, ref_logp, dense, beta=0.3, margin=margin, u=u, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    (got_grad,), (want_grad,) = torch.autograd.grad(loss, logp), torch.autograd.grad(want, logp)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=1e-7)
    rewards = 0.3 * dense @ (logp - ref_logp).detach().double()
    assert metrics["rewards/weighted_margins"] == pytest.approx(rewards.mean().item())
    assert metrics["rewards/weighted_accuracies"] == pytest.approx((rewards > 0).double().mean().item())


def test_gradient_is_the_transposed_matrix_times_the_slopes():
    batch, logp, ref_logp = case()
    loss, _ = token_dpo_loss(logp_R=logp, ref_logp_R=ref_logp, C=batch.C, beta=0.3)
    loss.backward()
    margin = batch.C @ (logp - ref_logp).detach().double()
    slope = -0.3 * torch.sigmoid(-0.3 * margin) / len(margin)
    torch.testing.assert_close(logp.grad.double(), batch.C.T @ slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("num_trees", [1, 3, 7])
def test_equal_models_give_ln_2_to_the_bit(num_trees):
    batch, logp, _ = case(range(num_trees))
    loss, _ = token_dpo_loss(logp_R=logp, ref_logp_R=logp.detach(), C=batch.C)
    assert loss.item() == float(np.float32(math.log(2)))
    smooth, _ = token_dpo_loss(logp_R=logp, ref_logp_R=logp.detach(), C=batch.C, label_smoothing=0.2)
    assert smooth.item() == float(np.float32(math.log(2)))


@pytest.mark.parametrize("options", LOSSES)
def test_no_trained_rows(options):
    batch = pack_trees([random_tree(0)], terms=[Term([zero_weights(random_tree(0))])])
    logp = torch.zeros(0, requires_grad=True)
    loss, _ = token_dpo_loss(logp_R=logp, ref_logp_R=logp.detach(), C=batch.C, **options)
    loss.backward()
    assert math.isfinite(loss.item())


def zero_weights(tree):
    return [
        tuple([0.0] * len(tree.completion_ids(leaf)) for leaf in (pair.chosen, pair.rejected)) for pair in tree.pairs
    ]


@pytest.mark.parametrize("options", LOSSES)
def test_eight_pairs_at_once_equal_two_times_four(options):
    trees = [random_tree(seed) for seed in range(2)]
    assert sum(len(tree.pairs) for tree in trees) == 8
    hidden = {tree.id: torch.randn(200, 6) for tree in trees}
    ref_weight, weight = torch.randn(40, 6), torch.randn(40, 6)

    def accumulate(parts):
        head = weight.clone().requires_grad_()
        total = 0.0
        for part in parts:
            batch = pack_trees(part, terms=[Term(means(part) if options["loss_type"] == "ipo" else None)])
            sizes = torch.tensor(batch.tree_starts).diff().tolist()
            hidden_TH = torch.cat([hidden[tree.id][:size] for tree, size in zip(part, sizes, strict=True)])
            rows, target = hidden_TH[batch.row_R[: batch.num_trained]], batch.target_R[: batch.num_trained]
            loss, _ = linear_token_dpo_loss(
                hidden_RH=rows,
                weight_VH=head,
                target_R=target,
                ref_logp_R=linear_logp_reference(rows, ref_weight, target),
                C=batch.C,
                denominator=8,
                **options,
            )
            loss.backward()
            total += loss.item()
        return total, head.grad

    (whole, whole_grad), (halves, halves_grad) = accumulate([trees]), accumulate([[tree] for tree in trees])
    assert halves == pytest.approx(whole, rel=1e-6)
    assert (halves_grad - whole_grad).norm() < 1e-6 * whole_grad.norm()


@pytest.mark.parametrize("options", LOSSES)
def test_linear_loss_equals_its_parts(options):
    torch.manual_seed(0)
    batch, _, ref_logp = case()
    hidden = torch.randn(batch.num_trained, 6, requires_grad=True)
    weight = torch.randn(40, 6, requires_grad=True)
    target = batch.target_R[: batch.num_trained]
    loss, metrics = linear_token_dpo_loss(
        hidden_RH=hidden, weight_VH=weight, target_R=target, ref_logp_R=ref_logp, C=batch.C, beta=0.3, **options
    )
    logp = linear_logp_reference(hidden, weight, target)
    want, want_metrics = token_dpo_loss(logp_R=logp, ref_logp_R=ref_logp, C=batch.C, beta=0.3, **options)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    assert metrics == pytest.approx(want_metrics)
    for got, expected in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True
    ):
        assert (got - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("loss", [token_dpo_loss, linear_token_dpo_loss])
def test_a_matrix_that_is_read_once_gives_the_same(loss):
    batch, logp, ref_logp = case()
    given = {"logp_R": logp}
    if loss is linear_token_dpo_loss:
        given = {"hidden_RH": torch.randn(batch.num_trained, 6), "weight_VH": torch.randn(40, 6)}
        given["target_R"] = batch.target_R[: batch.num_trained]
    first, metrics = loss(**given, ref_logp_R=ref_logp, C=batch.C)
    again, metrics_again = loss(**given, ref_logp_R=ref_logp, C=PairMatrix.from_sparse(batch.C))
    assert torch.equal(first, again) and metrics == metrics_again


def test_weighted_likelihood_is_the_linear_loss():
    batch, logp, _ = case()
    loss, _ = token_dpo_loss(
        logp_R=logp, ref_logp_R=torch.zeros_like(logp), C=batch.C, beta=1.0, loss_type="linear", denominator=1.0
    )
    torch.testing.assert_close(loss.double(), -(batch.C @ logp.detach().double()).sum(), rtol=1e-6, atol=0)


def test_pair_metrics_equal_the_loop():
    trees = [random_tree(seed, tools=True) for seed in range(3)]
    batch = pack_trees(trees)
    logp, ref_logp = -torch.rand(len(batch.row_R)), -torch.rand(len(batch.row_R))
    got = pair_metrics(
        logp_R=logp, ref_logp_R=ref_logp, chosen_PR=batch.chosen_PR, rejected_PR=batch.rejected_PR, beta=0.3
    )
    chosen, rejected = batch.chosen_PR.to_dense().bool(), batch.rejected_PR.to_dense().bool()
    sums = [
        (logp[c].sum(), ref_logp[c].sum(), logp[r].sum(), ref_logp[r].sum())
        for c, r in zip(chosen, rejected, strict=True)
    ]
    rewards = torch.tensor([[0.3 * (c - rc), 0.3 * (r - rr)] for c, rc, r, rr in sums])
    assert got == pytest.approx(
        {
            "rewards/chosen": rewards[:, 0].mean().item(),
            "rewards/rejected": rewards[:, 1].mean().item(),
            "rewards/margins": (rewards[:, 0] - rewards[:, 1]).mean().item(),
            "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).float().mean().item(),
            "logps/chosen": float(np.mean([s[0].item() for s in sums])),
            "logps/rejected": float(np.mean([s[2].item() for s in sums])),
        },
        rel=1e-5,
    )


def test_what_does_not_fit_is_refused():
    batch, logp, ref_logp = case()
    good = {"logp_R": logp, "ref_logp_R": ref_logp, "C": batch.C}
    with pytest.raises(ValueError, match="trained rows only"):
        token_dpo_loss(**{**good, "logp_R": torch.cat([logp, logp])})
    with pytest.raises(ValueError, match="'dpo', not one of"):
        token_dpo_loss(**good, loss_type="dpo")
    with pytest.raises(ValueError, match="label_smoothing"):
        token_dpo_loss(**good, label_smoothing=0.1, loss_type="ipo")
    with pytest.raises(ValueError, match="label_smoothing"):
        token_dpo_loss(**good, label_smoothing=0.5)
