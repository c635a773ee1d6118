from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from pair_cases import LOSSES, rows, sparse, trees
from random_trees import random_tree
from ttpa_kernels.token_dpo.op import _token_dpo, token_dpo
from ttpa_kernels.token_dpo.pairs import PairMatrix
from ttpa_kernels.token_dpo.reference import token_dpo_reference

from ttpa.trees.pack import pack_trees


def loop(logp, ref_logp, C, *, beta, loss_type, label_smoothing=0.0, margin=None, u=None, denominator=None):
    """The slow twin: one pair and one entry at a time, with the loss written out."""
    e, total, margins = label_smoothing, torch.zeros((), dtype=torch.float64), []
    for p in range(len(C)):
        m = torch.zeros((), dtype=torch.float64)
        for r in C[p].nonzero()[:, 0].tolist():
            m = m + C[p, r].double() * (logp[r].double() - (0.0 if ref_logp is None else ref_logp[r].double()))
        margins.append(m.detach())
        x = beta * m + (0.0 if margin is None else margin[p])
        wrong, right = torch.log(1 + torch.exp(-x)), torch.log(1 + torch.exp(x))
        f = {
            "sigmoid": (1 - e) * wrong + e * right,
            "robust": ((1 - e) * wrong - e * right) / (1 - 2 * e),
            "hinge": torch.clamp(1 - x, min=0),
            "ipo": (x / beta - 1 / (2 * beta)) ** 2,
            "linear": -x,
        }[loss_type]
        total = total + (1.0 if u is None else u[p]) * f
    return total / (max(len(C), 1) if denominator is None else denominator), torch.stack(margins or [total])[: len(C)]


MATRICES = {
    "trees": lambda: trees(0, 1, 2),
    "one pair": lambda: sparse(1, 9, 0.7),
    "full": lambda: sparse(5, 7, 1.0),
    "thin": lambda: sparse(12, 30, 0.04),
    "no pairs": lambda: sparse(0, 4, 1.0),
    "no rows": lambda: sparse(3, 0, 1.0),
    "no entries": lambda: sparse(3, 4, 0.0),
    "csr of fp32": lambda: sparse(6, 20, 0.3, dtype=torch.float32).to_sparse_csr(),
}


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("options", LOSSES, ids=lambda o: "-".join(map(str, o.values())))
def test_equals_the_loop(matrix, options, poisoned):
    C = MATRICES[matrix]()
    logp, ref_logp = rows(C)
    margin = torch.linspace(-0.5, 0.5, C.shape[0], dtype=torch.float64)
    u = torch.linspace(0.5, 1.5, C.shape[0])
    loss, margins = token_dpo(
        logp_R=logp,
        ref_logp_R=ref_logp,
        pairs=PairMatrix.from_sparse(C),
        beta=0.3,
        margin_P=margin,
        pair_weight_P=u,
        **options,
    )
    want, want_margins = loop(logp, ref_logp, C.to_dense(), beta=0.3, margin=margin, u=u, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-7, atol=0)
    torch.testing.assert_close(margins.margin_P, want_margins, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(margins.reward_P, 0.3 * want_margins, rtol=1e-13, atol=1e-13)
    P = max(C.shape[0], 1)
    assert margins.mean_reward.item() == pytest.approx(0.3 * want_margins.sum().item() / P, abs=1e-12)
    assert margins.accuracy.item() == pytest.approx((want_margins > 0).sum().item() / P)
    upstream = torch.tensor(-1.7)
    (got,) = torch.autograd.grad(loss, logp, upstream)
    want_gradient = torch.zeros_like(logp)
    if want.requires_grad:
        (want_gradient,) = torch.autograd.grad(want, logp, upstream.double())
    assert got.dtype == logp.dtype
    torch.testing.assert_close(got, want_gradient, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("options", LOSSES, ids=lambda o: "-".join(map(str, o.values())))
def test_equals_the_reference_and_its_own_differences(options):
    C = trees(3, 4)
    logp, ref_logp = rows(C, torch.float64)
    pairs = PairMatrix.from_sparse(C)

    def loss(logp):
        return token_dpo(logp_R=logp, ref_logp_R=ref_logp, pairs=pairs, beta=0.3, denominator=3.0, **options)[0]

    want, _ = token_dpo_reference(logp, ref_logp, C.to_dense(), beta=0.3, denominator=3.0, **options)
    assert loss(logp).dtype == torch.float64
    torch.testing.assert_close(loss(logp), want, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(loss, (logp,))


@pytest.mark.parametrize("num_trees", [1, 3, 7])
def test_equal_models_give_ln_2_to_the_bit(num_trees):
    C = trees(*range(num_trees))
    logp, _ = rows(C)
    for smoothing in (0.0, 0.2):
        loss, margins = token_dpo(
            logp_R=logp, ref_logp_R=logp.detach(), pairs=PairMatrix.from_sparse(C), label_smoothing=smoothing
        )
        assert loss.item() == float(np.float32(math.log(2)))
        assert not margins.margin_P.any()


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_large_margins_stay_finite_and_exact(scale):
    C = torch.eye(4, dtype=torch.float64).to_sparse()
    logp = torch.tensor([scale, -scale, 30.0, 380.0], requires_grad=True)
    for options in LOSSES:
        loss, _ = token_dpo(logp_R=logp, ref_logp_R=None, pairs=PairMatrix.from_sparse(C), **options)
        want, _ = token_dpo_reference(logp, None, C.to_dense(), **options)
        torch.testing.assert_close(loss.double(), want, rtol=1e-7, atol=0)
        assert torch.autograd.grad(loss, logp)[0].isfinite().all()


def test_a_long_response_is_summed_without_loss():
    logp = torch.full((300_001,), 1e-4)
    logp[0] = 1e4
    C = torch.ones(1, len(logp)).to_sparse()
    _, margins = token_dpo(logp_R=logp, ref_logp_R=None, pairs=PairMatrix.from_sparse(C))
    assert margins.margin_P.item() == pytest.approx(1e4 + 30, abs=1e-6)


def test_order_of_the_entries():
    C = sparse(9, 40, 0.07, seed=3)
    pairs = PairMatrix.from_sparse(C)
    order_P, start_P, row_E, value_E, order_R, start_R, pair_E, coefficient_E = pairs.structure
    dense = C.to_dense()
    assert sorted(order_P.tolist()) == list(range(9)) and sorted(order_R.tolist()) == list(range(40))
    again, transposed = torch.zeros_like(dense), torch.zeros_like(dense)
    for i, p in enumerate(order_P.tolist()):
        again[p, row_E[start_P[i] : start_P[i + 1]]] = value_E[start_P[i] : start_P[i + 1]]
    for i, r in enumerate(order_R.tolist()):
        transposed[pair_E[start_R[i] : start_R[i + 1]], r] = coefficient_E[start_R[i] : start_R[i + 1]]
    assert torch.equal(again, dense) and torch.equal(transposed, dense)
    used = (dense != 0).any(dim=0)
    assert pairs.num_used == used.sum() and used[order_R[: pairs.num_used]].all()


@pytest.mark.parametrize("seed", range(6))
def test_components(seed):
    C = sparse(10, 30, 0.06, seed=seed)
    pairs = PairMatrix.from_sparse(C)
    shared = (C.to_dense().abs() @ C.to_dense().abs().T > 0) | torch.eye(10, dtype=torch.bool)
    connected = torch.linalg.matrix_power(shared.double(), 10) > 0
    K = pairs.component_K3
    assert K[0].tolist() == [0, 0, 0] and K[-1].tolist() == [10, pairs.num_used, len(pairs.structure.row_E)]
    for first, last in pairwise(K):
        members = pairs.structure.order_P[first[0] : last[0]].tolist()
        assert connected[members[0]].nonzero()[:, 0].tolist() == sorted(members)
        columns = (C.to_dense()[members] != 0).any(dim=0).nonzero()[:, 0]
        assert pairs.structure.order_R[first[1] : last[1]].tolist() == columns.tolist()
        assert last[2] - first[2] == (C.to_dense()[members] != 0).sum()


def test_trees_are_the_components_of_a_pack():
    batch = pack_trees([random_tree(seed) for seed in range(4)])
    pairs = PairMatrix.from_sparse(batch.C)
    assert pairs.in_order and pairs.component_K3[:, 0].tolist() == [0, 4, 8, 12, 16]


def test_backward_twice_and_repeated_runs_give_the_same_bits():
    C = trees(0, 1)
    logp, ref_logp = rows(C)
    pairs = PairMatrix.from_sparse(C)
    gradients = []
    for _ in range(2):
        loss, _ = token_dpo(logp_R=logp, ref_logp_R=ref_logp, pairs=pairs)
        gradients.append(torch.autograd.grad(loss, logp, retain_graph=True)[0])
    gradients.append(torch.autograd.grad(loss, logp)[0])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_a_second_derivative_is_refused():
    C = trees(0)
    logp, ref_logp = rows(C)
    loss, _ = token_dpo(logp_R=logp, ref_logp_R=ref_logp, pairs=PairMatrix.from_sparse(C))
    (gradient,) = torch.autograd.grad(loss, logp, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), logp)


def test_custom_op_and_compile():
    C = trees(0, 1)
    logp, ref_logp = rows(C)
    pairs = PairMatrix.from_sparse(C)
    arguments = (logp, ref_logp, list(pairs.structure), None, None, 0.1, "sigmoid", 0.0, 8.0, "torch")
    torch.library.opcheck(_token_dpo, arguments)

    def loss(logp):
        return token_dpo(logp_R=2 * logp, ref_logp_R=ref_logp, pairs=pairs)[0]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logp), loss(logp))
    assert torch.equal(torch.autograd.grad(compiled(logp), logp)[0], torch.autograd.grad(loss(logp), logp)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss_type": "dpo"}, ValueError, "'dpo', not one of"),
        ({"label_smoothing": 0.5}, ValueError, "label_smoothing"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, ValueError, "sigmoid and robust"),
        ({"beta": 0.0}, ValueError, "beta is 0.0"),
        ({"denominator": 0}, ValueError, "denominator is 0"),
        ({"logp_R": torch.zeros(5)}, ValueError, "one number for each"),
        ({"ref_logp_R": torch.zeros(4, dtype=torch.int64)}, TypeError, "ref_logp_R is torch.int64"),
        ({"ref_logp_R": torch.zeros(4, device="meta")}, ValueError, "one device"),
        ({"margin_P": torch.zeros(2)}, ValueError, "C has 3 pairs"),
        ({"pair_weight_P": torch.zeros(3, 1)}, ValueError, "pair_weight_P"),
        ({"engine": "cuda"}, ValueError, "engine is 'cuda'"),
    ],
)
def test_checks_say_what_to_do(change, error, message):
    good = {"logp_R": torch.zeros(4), "ref_logp_R": torch.zeros(4), "pairs": PairMatrix.from_sparse(sparse(3, 4, 0.5))}
    with pytest.raises(error, match=message):
        token_dpo(**{**good, **change})


def test_what_is_no_matrix_of_coefficients_is_refused():
    with pytest.raises(ValueError, match="sparse matrix"):
        PairMatrix.from_sparse(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="float64"):
        PairMatrix.from_sparse(torch.zeros(3, 4, dtype=torch.int64).to_sparse())
