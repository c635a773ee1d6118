from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import trl.kernels
import trl.trainer.utils
from head_cases import upstream
from trl.kernels.chunked_logprob import ChunkedLogProbFunction as TRLFunction
from ttpa_kernels.adapters import trl as adapter
from ttpa_kernels.adapters.cross_entropy import linear_cross_entropy

R, H, V = 31, 16, 203


def head(dtype=torch.float32, *, bias=True, peak=4.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(R, H, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=generator) * peak / H**0.5).to(dtype).requires_grad_()
    offset = torch.randn(V, generator=generator).to(dtype).requires_grad_() if bias else None
    target = torch.randint(V, (R,), generator=generator)
    target[:8] = (hidden.float() @ weight.float().T).argmax(dim=1)[:8]
    return hidden, weight, offset, target


def run(function, inputs, dtype=None, entropy=0.7, **options):
    """Results and gradients of a function with TRL's signature; inputs converted to `dtype` first."""
    hidden, weight, bias, target = inputs
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (hidden, weight, bias) if x is not None]
    found = function.apply(*leaves[:2], leaves[2] if bias is not None else None, target, 0.8, 64, 5.0, 1.5, **options)
    total = (found[0].double() * upstream(R)).sum()
    if found[1] is not None:
        total = total + entropy * (found[1].double() * upstream(R).flip(0)).sum()
    return found, torch.autograd.grad(total, leaves)


def error(got, want) -> float:
    return float((got.detach().double() - want).norm() / want.norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_apply_is_that_of_trl_and_closer_to_the_truth(dtype, bias):
    inputs = head(dtype, bias=bias)
    got, gradients = run(adapter.ChunkedLogProbFunction, inputs)
    theirs, their_gradients = run(TRLFunction, inputs)
    exact, exact_gradients = run(adapter.ChunkedLogProbFunction, inputs, torch.float64)
    assert [x.dtype for x in got] == [x.dtype for x in theirs] and torch.equal(got[4], exact[4])
    assert torch.equal(got[4], theirs[4]) or dtype == torch.bfloat16
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for mine, their, true in zip(
        (*got[:4], *gradients), (*theirs[:4], *their_gradients), (*exact[:4], *exact_gradients), strict=True
    ):
        assert mine.dtype == their.dtype
        assert error(their, true) < tolerance, "TRL's function computes something else"
        assert error(mine, true) <= 1.1 * error(their, true) + 5e-7
    if dtype == torch.bfloat16:
        assert error(got[0], exact[0]) < 1e-5 < error(theirs[0], exact[0])


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy"), ("mean_logits", "is_top1")], ids=str)
def test_only_what_is_asked_for_is_returned(outputs):
    got, _ = run(adapter.ChunkedLogProbFunction, head(), outputs=outputs)
    theirs, _ = run(TRLFunction, head(), outputs=outputs)
    assert [x is None for x in got] == [x is None for x in theirs]


@pytest.fixture
def installed():
    adapter.install()
    yield
    adapter.uninstall()


def test_install_and_uninstall(installed):
    assert trl.kernels.ChunkedLogProbFunction is adapter.ChunkedLogProbFunction
    assert trl.trainer.utils._ChunkedLogProbFunction is adapter.ChunkedLogProbFunction
    adapter.uninstall()
    assert trl.kernels.ChunkedLogProbFunction is trl.trainer.utils._ChunkedLogProbFunction is TRLFunction


def fused_head(model, ids, labels, *, autocast=False, outputs=("log_probs", "entropy")):
    """Log-probabilities, entropies and the head's gradient as TRL's trainers compute them."""
    trl.trainer.utils.add_fused_lm_head(model, temperature=0.9, outputs=outputs)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    weights = torch.linspace(-1, 1, found.log_probs.numel()).view_as(found.log_probs)
    ((found.log_probs - 0.3 * found.entropy) * weights).sum().backward()
    return found.log_probs.detach(), found.entropy.detach(), model.get_output_embeddings().weight.grad.clone()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_fused_head_of_trl(tiny_model, autocast):
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight.mul_(8)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tiny_model.config.vocab_size, (2, 20), generator=generator)
    labels = ids.clone()
    labels[:, :6] = -100
    theirs = fused_head(tiny_model, ids, labels, autocast=autocast)
    adapter.install()
    try:
        mine = fused_head(tiny_model, ids, labels, autocast=autocast)
        exact = fused_head(tiny_model.double(), ids, labels)
    finally:
        adapter.uninstall()
    for got, their, true in zip(mine, theirs, exact, strict=True):
        assert error(their, true) < (0.1 if autocast else 1e-4)
        assert error(got, true) <= 1.1 * error(their, true) + 5e-7


def test_importing_does_not_import_trl():
    code = "import sys, ttpa_kernels.adapters.trl, ttpa_kernels.adapters.cross_entropy; print('trl' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignore_index", [None, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_that_of_torch(reduction, ignore_index, weighted):
    hidden, weight, bias, target = head(torch.float64)
    target[3:9] = -100 if ignore_index is None else ignore_index
    classes = torch.rand(V, dtype=torch.float64) if weighted else None
    options = {
        "weight": classes,
        "reduction": reduction,
        "ignore_index": -100 if ignore_index is None else ignore_index,
    }
    want = F.cross_entropy(F.linear(hidden, weight, bias), target, **options)
    got = linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options | {"ignore_index": ignore_index})
    torch.testing.assert_close(got, want)
    g = torch.randn(want.shape, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(x, (hidden, weight, bias), g) for x in (got, want)))


def test_cross_entropy_of_one_row():
    hidden, weight, bias, target = head()
    got = linear_cross_entropy(hidden[0], weight, target[0], linear_bias=bias, reduction="none")
    torch.testing.assert_close(got, F.cross_entropy(F.linear(hidden[0], weight, bias), target[0], reduction="none"))


def test_cross_entropy_keeps_fp32_for_half_inputs():
    hidden, weight, _, target = head(torch.bfloat16, bias=False)
    got = linear_cross_entropy(hidden, weight, target, reduction="none")
    want = F.cross_entropy(hidden.double() @ weight.double().T, target, reduction="none")
    assert got.dtype == torch.float32 and error(got, want) < 1e-6


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"reduction": "max"}, ValueError, "'none', 'mean' or 'sum'"),
        ({"label_smoothing": 0.1}, ValueError, "only 0 is supported"),
        ({"target": torch.rand(R, V)}, TypeError, "class indices"),
        ({"target": torch.zeros(R - 1, dtype=torch.int64)}, ValueError, r"\[N, H\], \[V, H\] and \[N\]"),
        ({"weight": torch.rand(V - 1)}, ValueError, "one entry for each of 203 classes"),
    ],
    ids=str,
)
def test_cross_entropy_says_what_it_does_not_take(change, kind, message):
    hidden, weight, bias, target = head()
    given = {"input": hidden, "linear_weight": weight, "target": target, "linear_bias": bias} | change
    with pytest.raises(kind, match=message):
        linear_cross_entropy(**given)
