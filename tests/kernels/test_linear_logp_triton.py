from __future__ import annotations

from typing import Any

import pytest
import torch
from head_cases import assert_as_exact_as_eager, exact_logits, head_case
from shipped import NEWEST, shipped
from ttpa_kernels.configs import LogitTile
from ttpa_kernels.linear_logp import kernel
from ttpa_kernels.linear_logp.chunks import STATS, Exponentials, Head, Rows
from ttpa_kernels.linear_logp.reference import head_stats_reference, reference_logits

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of NumPy, about infinities and lanes without a row
]
TINY = LogitTile(16, 32, 16, 4, 2, strip=16, target_rows=16)
OPTIONS = {
    "none": {},
    "softcap": {"softcap": 5.0, "logit_scale": 1.7},
    "all": {"bias": True, "rank": 5, "softcap": 6.0, "logit_scale": -1.5, "temperature": 0.7},
    "scaled": {"bias": True, "rank": 19, "logit_scale": -0.6, "temperature": 1.3},
}


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `head_case` takes and what the head takes."""
    tensors = {name: options[name] for name in ("bias", "rank") if name in options}
    return tensors, {name: value for name, value in options.items() if name not in tensors}


def parts(case: dict[str, Any], **numbers: float) -> tuple[Head, Rows]:
    tensors = {name: x.detach() for name, x in case.items()}
    head = Head(tensors["weight_VH"], tensors.get("bias_V"), tensors.get("adapter_VA"), **numbers)
    return head, Rows(tensors["hidden_RH"], tensors["target_R"], tensors.get("adapter_RA"))


def run(case: dict[str, Any], *, stats: bool = False, config: LogitTile | None = TINY, **options: Any) -> Exponentials:
    out = options.pop("out", None)
    return kernel.exponentials(*parts(case, **options), stats=stats, out=out, config=config)


def expected(
    case: dict[str, Any],
    dtype: torch.dtype,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Log-probabilities, their derivative in the raw logits, and the statistics, all in one dtype."""
    tensors = {name: x.detach() for name, x in case.items()}
    target = tensors.pop("target_R")
    raw = reference_logits(**tensors, dtype=dtype).requires_grad_()
    x = raw * logit_scale
    z = (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature
    logp = torch.log_softmax(z, dim=1).gather(1, target[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(logp.sum(), raw)
    stats = head_stats_reference(z.detach(), target)
    named = {name: value.to(dtype) for name, value in zip(STATS, stats, strict=True)}
    return {"logp": logp.detach(), "gradient": gradient, **named}


def found(e: Exponentials) -> dict[str, torch.Tensor]:
    values = {"logp": e.logp_C, "gradient": e.factor_C[:, None] * e.E_CV.float()}
    if e.stats_SC is not None:
        values |= zip(STATS, e.stats_SC, strict=True)
    return values


def assert_right(e: Exponentials, case: dict[str, Any], *, ulps: float = 8.0, **numbers: Any) -> None:
    """As exact as eager PyTorch with all logits in fp32."""
    got = found(e)
    exact, eager = (expected(case, dtype, **numbers) for dtype in (torch.float64, torch.float32))
    if e.E_CV.dtype != torch.float32:  # the allowance is that of rounding an exact result
        eager["gradient"] = exact["gradient"].to(e.E_CV.dtype)
    if "mean_logit" in got:  # it may nearly vanish, so measure its error by the size of the logits
        for values in (got, exact, eager):
            values["mean_logit"] = (values["mean_logit"] - exact["lse"]).to(values["mean_logit"].dtype)
    assert_as_exact_as_eager(got, {name: exact[name] for name in got}, {name: eager[name] for name in got}, ulps=ulps)
    assert bool((e.logp_C <= 0).all())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("R", "H", "V"), [(37, 40, 100), (5, 9, 161), (1, 8, 7)])  # descriptors, pointers, one tile
def test_equals_float64(R, H, V, dtype, options, device, poisoned):
    tensors, numbers = split(OPTIONS[options])
    case = head_case(R, H, V, dtype=dtype, peak=3.0, device=device, **tensors)
    assert_right(run(case, stats=True, **numbers), case, **numbers)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [104, 101])  # E is stored with descriptors, and with pointers
def test_half_precision_exponentials(V, dtype, options, device, poisoned):
    tensors, numbers = split(OPTIONS[options])
    case = head_case(20, 16, V, dtype=dtype, peak=3.0, device=device, **tensors)
    out = torch.full((20, V), torch.nan, dtype=dtype, device=device)
    e = run(case, out=out, **numbers)
    assert e.E_CV is out
    exact = expected(case, torch.float64, **numbers)["gradient"]
    error = ((e.factor_C.double()[:, None] * out.double() - exact) / exact.abs().amax(dim=1, keepdim=True)).abs()
    roundings = 2 if dtype == torch.float16 else 1  # fp16 is stored twice
    assert error.max() < roundings * 0.51 * torch.finfo(dtype).eps


def test_shipped_tiles(device):
    for dtype, H in ((torch.bfloat16, 72), (torch.bfloat16, 9), (torch.float32, 9)):
        case = head_case(3, H, 300, dtype=dtype, peak=3.0, device=device)
        assert_right(run(case, config=None), case)


@pytest.mark.parametrize("peak", [100.0, 2000.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_references_of_tiles_differ(dtype, peak, device, poisoned):
    """Targets far below the largest logit, and logits up to 1e4: strips have references of their own."""
    case = head_case(24, 16, 90, dtype=dtype, peak=peak, device=device)
    z = exact_logits(hidden_RH=case["hidden_RH"].detach(), weight_VH=case["weight_VH"].detach())
    case["target_R"][:8], case["target_R"][8:16] = z.argmin(dim=1)[:8], z.argmax(dim=1)[8:16]
    assert float(z.amax() - z.amin()) > 3 * peak
    e = run(case, stats=peak < 1000)  # entropies of 0 have no digits to compare
    assert bool(e.E_CV.isfinite().all())
    assert_right(e, case, ulps=40.0)  # the interpreter of older Tritons rounds a fused multiply-add twice


def test_confident_targets(device):
    case = head_case(8, 16, 50, peak=0.1, device=device)
    case["hidden_RH"].requires_grad_(False).copy_(12 * torch.eye(16, device=device)[:8])
    case["weight_VH"].requires_grad_(False)[:8] += torch.eye(16, device=device)[:8]
    case["target_R"] = torch.arange(8, device=device)
    e = run(case)
    assert float(expected(case, torch.float64)["logp"].min()) > -1e-3
    assert_right(e, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_equal_logits(dtype, scale, device):
    case = head_case(5, 8, 70, dtype=dtype, device=device)
    case["weight_VH"].requires_grad_(False).copy_(case["weight_VH"][:1].clone())
    case["target_R"][:2] = 0
    e = run(case, stats=True, logit_scale=scale)
    torch.testing.assert_close(e.logp_C, torch.full_like(e.logp_C, 1 / 70).log(), rtol=1e-6, atol=0)
    assert e.stats_SC[4].tolist() == [1, 1, 0, 0, 0]
    p = torch.full((5, 70), 1 / 70, device=device) - torch.nn.functional.one_hot(case["target_R"], 70)
    torch.testing.assert_close(e.factor_C[:, None] * e.E_CV, -p * scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_tokens_that_are_ruled_out(dtype, softcap, device):
    """A bias of -inf: whole strips without a possible token, also where the target is one of them."""
    case = head_case(5, 8, 70, dtype=dtype, bias=True, device=device)
    case["bias_V"].requires_grad_(False)[10:60] = -torch.inf
    case["target_R"][:] = torch.tensor([3, 61, 69, 20, 0])
    e = run(case, softcap=softcap)
    assert not bool(e.E_CV.isnan().any()) and not bool(e.logp_C.isnan().any())
    exact = expected(case, torch.float64, softcap=softcap)
    torch.testing.assert_close(e.logp_C.double(), exact["logp"], rtol=1e-5, atol=1e-5)
    possible = [0, 1, 2, 4]
    got = (e.factor_C[:, None] * e.E_CV)[possible].double()
    torch.testing.assert_close(got, exact["gradient"][possible].nan_to_num(0.0), rtol=1e-4, atol=1e-6)


def test_one_token(device):
    e = run(head_case(3, 8, 1, device=device), stats=True)
    assert float(e.logp_C.abs().max()) < 2e-7 and e.E_CV.tolist() == [[0], [0], [0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", ["none", "all"])
def test_a_row_has_the_same_bits_everywhere(dtype, options, device):
    """Wherever it stands, among however many rows, with and without exponentials and statistics."""
    tensors, numbers = split(OPTIONS[options])
    case = head_case(40, 24, 90, dtype=dtype, peak=3.0, device=device, **tensors)
    if device.type == "cpu":  # whose products have the same bits in any order only if they are exact
        case = {name: x if name == "target_R" else (x * 8).round() / 8 for name, x in case.items()}
    head, rows = parts(case, **numbers)
    e = kernel.exponentials(head, rows, stats=False, out=None, config=TINY)
    for order in (
        torch.randperm(40, generator=torch.Generator().manual_seed(0)),
        torch.arange(17, 30),
        torch.tensor([5]),
    ):
        some = Rows(*(None if x is None else x[order.to(device)] for x in rows))
        logp, _ = kernel.logps(head, some, stats=False, config=TINY)
        assert torch.equal(logp, e.logp_C[order])
        again = kernel.exponentials(head, some, stats=True, out=None, config=TINY)
        assert torch.equal(again.logp_C, e.logp_C[order]) and torch.equal(again.E_CV, e.E_CV[order])


def test_pointers_and_descriptors_agree(monkeypatch, device):
    case = head_case(20, 32, 104, dtype=torch.bfloat16, peak=3.0, device=device)
    with_descriptors = run(case, stats=True)
    monkeypatch.setattr(kernel, "descriptors_fit", lambda *matrices: False)
    with_pointers = run(case, stats=True)
    assert all(map(torch.equal, found(with_descriptors).values(), found(with_pointers).values()))


def test_peaked_logits_are_exact(device):
    case = head_case(48, 256, 4096, dtype=torch.bfloat16, peak=6.0, device=device)
    head, rows = parts(case)
    logp, _ = kernel.logps(head, rows, stats=False, config=LogitTile(16, 256, 64, 4, 2, strip=128, target_rows=16))
    exact = expected(case, torch.float64)["logp"]
    assert float((logp - exact).square().mean().sqrt()) < 2e-6


def test_views(device):
    """Rows of a wider head, hidden states in another order, exponentials in a wider buffer."""
    case = head_case(9, 16, 50, device=device)
    plain = run(case)
    wide = torch.full((50, 30), torch.nan, device=device)
    wide[:, 3:19] = case["weight_VH"].detach()
    case["weight_VH"], case["hidden_RH"] = wide[:, 3:19], case["hidden_RH"].detach().T.contiguous().T
    buffer = torch.full((9, 60), torch.nan, device=device)
    viewed = run(case, out=buffer[:, 5:55])
    assert all(map(torch.equal, found(plain).values(), found(viewed).values()))
    assert bool(buffer[:, :5].isnan().all()) and bool(buffer[:, 55:].isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_poisoned_row_stays_alone(dtype, device):
    case = head_case(6, 16, 50, dtype=dtype, device=device)
    clean = run(case, stats=True)
    case["hidden_RH"].requires_grad_(False)[2] = torch.nan
    e = run(case, stats=True)
    others = [0, 1, 3, 4, 5]
    assert bool(e.logp_C[2].isnan()) and bool(e.E_CV[2].isnan().all()) and bool(e.stats_SC[:4, 2].isnan().all())
    assert torch.equal(e.logp_C[others], clean.logp_C[others]) and torch.equal(e.E_CV[others], clean.E_CV[others])


def test_a_target_that_is_no_token(device):
    """Where nothing has looked before: nothing is read or written out of bounds, and the result says so."""
    case = head_case(4, 16, 50, device=device)
    clean = run(case)
    case["target_R"][1], case["target_R"][2] = -100, 50
    e = run(case)
    assert e.logp_C.isnan().tolist() == [False, True, True, False]
    assert torch.equal(e.E_CV[[0, 3]], clean.E_CV[[0, 3]])


def test_no_rows(device):
    e = run(head_case(0, 16, 50, device=device), stats=True)
    assert e.E_CV.shape == (0, 50) and e.logp_C.shape == e.factor_C.shape == (0,) and e.stats_SC.shape == (5, 0)


def test_every_tile_is_visited_once(monkeypatch, device):
    """More row tiles than a group holds, a last group that is not full, more tiles than programs."""
    case = head_case(75, 16, 70, dtype=torch.bfloat16, device=device)
    monkeypatch.setattr(kernel, "GROUP_BYTES", 2 * TINY.M * 16 * 2)  # two row tiles
    assert_right(run(case), case)


@pytest.mark.ahead
def test_shipped_kernels_compile_without_spills():
    for line in shipped("linear_logp"):
        assert line["stack"] == 0, line
        products = ("tiles" in line["name"] or "target" in line["name"]) and "fp32" not in line["name"]
        assert line["matrix"] == (NEWEST[line["architecture"]] if products else ""), line


@pytest.fixture(scope="module")
def large() -> tuple[Head, Rows, torch.Tensor]:
    """A head of 151,936 tokens with logits to about 26, 1024 rows, and their log-probabilities in fp64."""
    R, H, V = 1024, 2048, 151_936
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(R, H, device="cuda", generator=generator).bfloat16()
    weight = (torch.randn(V, H, device="cuda", generator=generator) * 5 / H**0.5).bfloat16()
    z = torch.cat([hidden.double() @ part.double().T for part in weight.split(1 << 14)], dim=1)
    target = torch.randint(V, (R,), device="cuda", generator=generator)
    target[::2] = z.argmax(dim=1)[::2]
    exact = z.gather(1, target[:, None])[:, 0] - z.logsumexp(dim=1)
    return Head(weight), Rows(hidden, target), exact


@pytest.mark.gpu
def test_large_vocabulary(large):
    head, rows, exact = large
    logp, _ = kernel.logps(head, rows, stats=False)
    z = torch.mm(rows.hidden_CH, head.weight_VH.T, out_dtype=torch.float32)
    eager = torch.log_softmax(z, dim=1).gather(1, rows.target_C[:, None])[:, 0]
    assert_as_exact_as_eager({"logp": logp}, {"logp": exact}, {"logp": eager})
    e = kernel.exponentials(head, rows, stats=False, out=None)
    gradient = torch.softmax(z.double(), dim=1).neg_()
    gradient.scatter_add_(1, rows.target_C[:, None], torch.ones_like(exact)[:, None])
    error = (e.factor_C[:, None] * e.E_CV.double() - gradient).norm()
    assert float(error) <= 1.5 * float((gradient.bfloat16().double() - gradient).norm())


@pytest.mark.gpu
def test_large_vocabulary_has_the_same_bits_everywhere(large):
    head, rows, _ = large
    e = kernel.exponentials(head, rows, stats=False, out=None)
    assert torch.equal(kernel.logps(head, rows, stats=False)[0], e.logp_C)
    assert torch.equal(kernel.logps(head, rows, stats=True)[0], e.logp_C)
    with_stats = kernel.exponentials(head, rows, stats=True, out=None)
    assert torch.equal(with_stats.logp_C, e.logp_C) and torch.equal(with_stats.E_CV, e.E_CV)
    for order in (torch.randperm(1024), torch.arange(100, 437), torch.tensor([1000])):
        some = Rows(rows.hidden_CH[order.cuda()], rows.target_C[order.cuda()])
        assert torch.equal(kernel.logps(head, some, stats=False)[0], e.logp_C[order.cuda()])
