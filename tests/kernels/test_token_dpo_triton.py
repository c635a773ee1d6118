from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from pair_cases import LOSSES, rows, sparse, trees
from shipped import shipped
from ttpa_kernels.token_dpo import segments
from ttpa_kernels.token_dpo.op import token_dpo
from ttpa_kernels.token_dpo.pairs import PairMatrix
from ttpa_kernels.token_dpo.reference import token_dpo_reference
from ttpa_kernels.token_dpo.segments import Loss, PairValues, Part

pytestmark = pytest.mark.triton


def both(C, device, dtype=torch.float32, **options):
    """Loss, margins, their means and the gradient of the kernels, and of the reference in fp64."""
    logp, ref_logp = (x.to(device) for x in rows(C, dtype))
    results = []
    for name in ("triton", "reference"):
        leaf = logp.detach().requires_grad_()
        if name == "triton":
            pairs = PairMatrix.from_sparse(C).to(device)
            loss, margins = token_dpo(logp_R=leaf, ref_logp_R=ref_logp, pairs=pairs, engine="triton", **options)
        else:
            loss, m_P = token_dpo_reference(leaf, ref_logp, C.to_dense().to(device), **options)
            P, reward_P = max(len(m_P), 1), options["beta"] * m_P
            margins = m_P, reward_P, reward_P.sum() / P, (m_P > 0).double().sum() / P
        gradient = torch.zeros_like(leaf)
        if loss.requires_grad:
            gradient = torch.autograd.grad(loss, leaf, torch.tensor(-1.7, dtype=loss.dtype, device=device))[0]
        results.append((loss, *margins, gradient))
    return results


MATRICES = {
    "trees": lambda: trees(0, 1),
    "one pair": lambda: sparse(1, 9, 0.7),
    "full": lambda: sparse(5, 7, 1.0),
    "thin": lambda: sparse(12, 150, 0.04),
    "no pairs": lambda: sparse(0, 4, 1.0),
    "no rows": lambda: sparse(3, 0, 1.0),
    "no entries": lambda: sparse(3, 4, 0.0),
    "fp32": lambda: sparse(6, 20, 0.3, dtype=torch.float32),
}


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(map(str, loss.values())))
def test_equals_the_reference(matrix, loss, device, poisoned):
    C = MATRICES[matrix]()
    P = C.shape[0]
    gamma = torch.linspace(-0.5, 0.5, P, dtype=torch.float64, device=device)
    got, want = both(
        C,
        device,
        beta=0.3,
        margin_P=gamma,
        pair_weight_P=torch.linspace(0.5, 2, P, device=device),
        denominator=3.3,
        **loss,
    )
    assert got[0].dtype == got[-1].dtype == torch.float32
    for mine, true, tolerance in zip(got, want, (1e-7, 1e-13, 1e-13, 1e-13, 1e-13, 2e-7), strict=True):
        torch.testing.assert_close(mine.double(), true.double(), rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(map(str, loss.values())))
@pytest.mark.parametrize("scale", [1e-9, 1e3, 1e6])
def test_equals_the_torch_engine_in_fp64(loss, scale, device):
    """Also where the logarithm of a probability near 1 needs all digits, and where exponentials vanish."""
    C = torch.cat([torch.eye(4), scale * torch.eye(4)], dim=1).double().to_sparse()
    logp = torch.tensor([30.0, -30.0, 380.0, 1.0, 1.0, -1.0, 0.0, 2.0], dtype=torch.float64, device=device)
    results = []
    for engine in ("triton", "torch"):
        leaf = logp.clone().requires_grad_()
        pairs = PairMatrix.from_sparse(C).to(device)
        value, _ = token_dpo(logp_R=leaf, ref_logp_R=None, pairs=pairs, beta=1.0, engine=engine, **loss)
        results.append((value, torch.autograd.grad(value, leaf)[0]))
    for mine, true in zip(*results, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-14, atol=0)


@pytest.mark.parametrize("num_trees", [1, 3])
def test_equal_models_give_ln_2_to_the_bit(num_trees, device):
    C = trees(*range(num_trees))
    logp = rows(C)[0].detach().to(device)
    pairs = PairMatrix.from_sparse(C).to(device)
    for smoothing in (0.0, 0.2):
        loss, margins = token_dpo(logp_R=logp, ref_logp_R=logp, pairs=pairs, label_smoothing=smoothing, engine="triton")
        assert loss.item() == float(np.float32(math.log(2))) and not margins.margin_P.any()


def test_not_a_number_is_not_hidden(device):
    C = trees(0)
    logp = rows(C)[0].detach().to(device)
    logp[-1] = torch.nan
    pairs = PairMatrix.from_sparse(C).to(device)
    for loss in LOSSES:
        assert token_dpo(logp_R=logp, ref_logp_R=None, pairs=pairs, engine="triton", **loss)[0].isnan()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 8, 16)])
def test_parts_and_small_blocks(sizes, device, poisoned):
    """A component at a time, in blocks smaller than a pair, equals everything at once."""
    from ttpa_kernels.token_dpo import kernel

    entries, block_pairs, block_rows = sizes
    C = sparse(9, 60, 0.05, seed=2)
    pairs = PairMatrix.from_sparse(C).to(device)
    logp = rows(C)[0].detach().to(device)
    loss = Loss(0.2, "robust", 0.1, 9.0)
    values, want = PairValues.empty(9, device), PairValues.empty(9, device)
    got_R, want_R = torch.zeros(60, device=device), torch.zeros(60, device=device)
    lines = pairs.component_K3.tolist()
    for first, last in pairwise(lines):
        part = Part(*map(slice, first, last))
        kernel.pair_values_(values, pairs.structure, part, logp, None, loss, entries=entries)
        kernel.row_gradients_(got_R, pairs.structure, part, values.slope_P, rows=block_rows)
        segments.pair_values_(want, pairs.structure, part, logp, None, loss, engine="torch")
        segments.row_gradients_(want_R, pairs.structure, part, want.slope_P, engine="torch")
    for mine, true in zip(values, want, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(got_R, want_R, rtol=1e-7, atol=1e-12)
    for mine, true in zip(
        kernel.totals(values, torch.float64, pairs=block_pairs),
        segments.totals(want, torch.float64, engine="torch"),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, rtol=1e-13, atol=0)


@pytest.mark.gpu
def test_repeated_runs_give_the_same_bits_and_nothing_waits(device):
    C = sparse(300, 40_000, 0.02)
    pairs = PairMatrix.from_sparse(C).to(device)
    logp, ref_logp = (x.detach().to(device) for x in rows(C))
    results = []
    for _ in range(3):
        leaf = logp.clone().requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, margins = token_dpo(logp_R=leaf, ref_logp_R=ref_logp, pairs=pairs)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append((loss, *margins, leaf.grad))
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


@pytest.mark.ahead
def test_shipped_kernels_compile_without_spills():
    lines = shipped("token_dpo")
    assert len(lines) == 24 and all(line["stack"] == 0 for line in lines)
