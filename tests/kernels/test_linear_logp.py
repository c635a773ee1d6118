from __future__ import annotations

import pytest
import torch
from ttpa_kernels import linear_logp
from ttpa_kernels.linear_logp import op
from ttpa_kernels.linear_logp.reference import linear_logp_reference


def inputs(R: int, H: int, V: int, *, dtype: torch.dtype = torch.float32, peak: float = 1.0):
    generator = torch.Generator().manual_seed(R + 1000 * V)
    hidden = torch.randn(R, H, generator=generator).to(dtype)
    weight = (torch.randn(V, H, generator=generator) * peak / H**0.5).to(dtype)
    target = torch.randint(V, (R,), generator=generator)
    upstream = torch.randn(R, generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_(), target, upstream


def gradients(function, hidden, weight, target, upstream):
    logp = function(hidden, weight, target)
    return logp.detach(), *torch.autograd.grad((logp.double() * upstream).sum(), (hidden, weight))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("plan", ["kept", "recomputed"])
@pytest.mark.parametrize(("R", "H", "V"), [(1, 3, 2), (7, 5, 11), (33, 16, 257), (64, 32, 100)])
def test_equals_float64(monkeypatch, plan, R, H, V):
    monkeypatch.setattr(op, "CHUNK_BYTES", 5 * V * 4)  # chunks of five rows, so most sizes are ragged
    if plan == "recomputed":
        monkeypatch.setattr(op, "KEEP_BYTES", 0)
    case = inputs(R, H, V)
    got, want = gradients(linear_logp, *case), gradients(linear_logp_reference, *case)
    assert got[0].dtype == torch.float32
    assert (got[0] - want[0]).abs().max() < 2e-6
    assert relative(got[1], want[1]) < 1e-6 and relative(got[2], want[2]) < 1e-6


@pytest.mark.parametrize("peak", [30.0, 300.0])
def test_peaked_logits(peak):
    hidden, weight, target, upstream = inputs(20, 16, 50, peak=peak)
    target[:10] = (hidden @ weight.T).argmax(dim=1)[:10]  # confident tokens, whose gradient nearly vanishes
    got = gradients(linear_logp, hidden, weight, target, upstream)
    want = gradients(linear_logp_reference, hidden, weight, target, upstream)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=2e-7 * peak)
    assert bool((got[0] <= 0).all())
    assert relative(got[1], want[1]) < 1e-5 and relative(got[2], want[2]) < 1e-5


def test_bfloat16_is_as_good_as_its_inputs():
    case = inputs(30, 64, 500, dtype=torch.bfloat16, peak=4.0)
    got, want = gradients(linear_logp, *case), gradients(linear_logp_reference, *case)
    assert got[0].dtype == torch.float32 and got[1].dtype == got[2].dtype == torch.bfloat16
    assert (got[0] - want[0]).abs().max() < 1e-5
    assert relative(got[1], want[1]) < 5e-3 and relative(got[2], want[2]) < 5e-3


def test_gradcheck_of_the_operation_and_of_its_reference():
    hidden, weight, target, _ = inputs(4, 3, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_logp(h, w, target), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: linear_logp_reference(h, w, target), (hidden, weight))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient(frozen):
    case = list(inputs(6, 4, 9))
    want = gradients(linear_logp_reference, *case)
    case[frozen].requires_grad_(False)
    hidden, weight, target, upstream = case
    (linear_logp(hidden, weight, target) * upstream.float()).sum().backward()
    assert case[frozen].grad is None
    assert relative(case[1 - frozen].grad, want[2 - frozen]) < 1e-6


def test_backward_twice_gives_the_same():
    hidden, weight, target, _ = inputs(6, 4, 9)
    logp = linear_logp(hidden, weight, target)
    first = torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(logp.sum(), (hidden, weight))
    assert all(map(torch.equal, first, second))


def test_same_bits_with_and_without_a_gradient():
    hidden, weight, target, _ = inputs(37, 16, 120)
    with torch.no_grad():
        plain = linear_logp(hidden, weight, target)
    assert torch.equal(linear_logp(hidden, weight, target), plain)


def test_autocast_changes_nothing():
    case = inputs(37, 16, 120)
    plain = gradients(linear_logp, *case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, plain, gradients(linear_logp, *case)))


def test_no_rows():
    hidden, weight, target, _ = inputs(0, 4, 9)
    logp = linear_logp(hidden, weight, target)
    assert logp.shape == (0,)
    dhidden, dweight = torch.autograd.grad(logp.sum(), (hidden, weight))
    assert dhidden.shape == (0, 4) and torch.equal(dweight, torch.zeros(9, 4))


def test_memory_stays_within_the_budgets(monkeypatch):
    V = 64
    monkeypatch.setattr(op, "CHUNK_BYTES", 10 * V * 4)
    monkeypatch.setattr(op, "KEEP_BYTES", 20 * V * 4)
    for R, kept in ((20, 20 * V), (21, 0)):
        hidden, weight, target, _ = inputs(R, 4, V)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            linear_logp(hidden, weight, target)
        assert sum(x.numel() for x in saved if x.ndim == 2 and x.shape[1] == V) == kept


def test_a_poisoned_row_stays_alone():
    hidden, weight, target, _ = inputs(6, 4, 9)
    clean = linear_logp(hidden, weight, target)
    poisoned = hidden.detach().clone()
    poisoned[2] = torch.nan
    logp = linear_logp(poisoned, weight, target)
    assert bool(logp[2].isnan()) and torch.equal(logp[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h, w, t: (h[0], w, t), ValueError, "matrices"),
        (lambda h, w, t: (h[:, :3], w, t), ValueError, "same width"),
        (lambda h, w, t: (h, w, t[:2]), ValueError, "one entry for each of 6 rows"),
        (lambda h, w, t: (h, w, t.int()), TypeError, "torch.int64"),
        (lambda h, w, t: (h.double(), w, t), TypeError, "same one of"),
        (lambda h, w, t: (h.half(), w.half(), t), TypeError, "float16"),
        (lambda h, w, t: (h, w, t.to("meta")), ValueError, "one device"),
        (lambda h, w, t: (h, w, t - 9), ValueError, r"vocabulary is \[0, 9\)"),
        (lambda h, w, t: (h, w, t + 9), ValueError, r"vocabulary is \[0, 9\)"),
    ],
)
def test_checks_say_what_to_do(change, error, message):
    hidden, weight, target, _ = inputs(6, 4, 9)
    with pytest.raises(error, match=message):
        linear_logp(*change(hidden, weight, target))
