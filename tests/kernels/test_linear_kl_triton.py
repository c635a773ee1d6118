from __future__ import annotations

import pytest
import torch
from shipped import NEWEST, shipped
from test_linear_kl import OPTIONS, SHAPES, Case, check_against_float64
from ttpa_kernels.configs import Tile
from ttpa_kernels.linear_kl import kernel
from ttpa_kernels.linear_kl.chunks import HALF_SCALE, Heads
from ttpa_kernels.linear_kl.op import linear_kl
from ttpa_kernels.linear_kl.reference import linear_kl_reference

pytestmark = pytest.mark.triton


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, device):
    if device.type == "cpu":
        for table in (kernel.LINEAR_KL, kernel.LINEAR_KL_FP16, kernel.LINEAR_KL_FP32):
            for arch in table:
                monkeypatch.setitem(table, arch, Tile(16, 32, 16, 4, 1))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(poisoned, device, shape, shared, options):
    check_against_float64(Case(*shape, shared=shared, options=options, device=device), engine="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", [1e-3, 0.1, 30.0])
def test_error_of_all_dtypes_near_and_far(poisoned, device, dtype, distance):
    case = Case(20, 40, 150, dtype=dtype, distance=distance, options="bias", device=device)
    check_against_float64(case, engine="triton")


@pytest.mark.parametrize("options", ["plain", "all"])
def test_a_policy_that_is_its_reference_diverges_by_nothing(device, options):
    case = Case(33, 40, 257, distance=0.0, shared=True, options=options, device=device)
    assert all(not bool(x.any()) for x in case.run(linear_kl, engine="triton"))


def test_huge_logits(device):
    case = Case(5, 8, 100, distance=1.0, device=device)
    with torch.no_grad():
        case.weight *= 1e4
        case.ref_weight *= 1e4
    want = case.run(linear_kl_reference)
    assert want[0].max() > 1e4
    for a, b in zip(case.run(linear_kl, engine="triton"), want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_excluded_tokens(device):
    case, short = (Case(6, 8, 100, options="bias", device=device) for _ in range(2))
    case.bias.data[12:] = case.ref_bias[12:] = -torch.inf  # whole strips are excluded
    short.options["vocab_size"] = 12
    want = short.run(linear_kl, engine="triton")
    for a, b in zip(case.run(linear_kl, engine="triton"), want, strict=True):
        torch.testing.assert_close(a, b)
    for token in (12, 99):  # the reference knows a token that the policy never says, alone in its strip or not
        case.ref_bias[12:] = -torch.inf
        case.ref_bias[token] = 0.0
        kl, *gradients = case.run(linear_kl, engine="triton")
        assert bool((kl == torch.inf).all()) and all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("side", ["hidden", "ref_hidden"])
def test_a_poisoned_row_stays_alone(device, side):
    case = Case(6, 16, 90, device=device)
    clean = case.run(linear_kl, engine="triton")[0]
    getattr(case, side).data[2] = torch.nan
    kl = case.run(linear_kl, engine="triton")[0]
    assert bool(kl[2].isnan()) and torch.equal(kl[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


def test_a_row_does_not_depend_on_its_place(device):
    case = Case(40, 16, 90, device=device)
    with torch.no_grad():
        whole = linear_kl(case.hidden, case.weight, case.ref_hidden, engine="triton")
        part = linear_kl(case.hidden[7:20], case.weight, case.ref_hidden[7:20], engine="triton")
    assert torch.equal(whole[7:20], part)


@pytest.mark.parametrize("H", [48, 44])  # rows that descriptors can load, and rows that they cannot
@pytest.mark.parametrize("shared", [True, False])
def test_descriptors_and_pointers_in_fp16(poisoned, device, shared, H):
    case = Case(37, H, 101, dtype=torch.float16, shared=shared, device=device)
    heads = Heads(case.weight.detach(), case.ref_weight, softcap=9.0)
    out = tuple(torch.empty(37, 112, dtype=torch.float16, device=device)[:, :101] for _ in range(2))
    kl = kernel.divergences(heads, case.hidden.detach(), case.ref_hidden, out=out, scale=HALF_SCALE)
    raw = (case.hidden.detach().double() @ case.weight.detach().double().T).requires_grad_()
    reference = (case.ref_hidden.double() @ (case.weight if shared else case.ref_weight).detach().double().T).detach()
    eye = torch.eye(101, dtype=torch.float64, device=device)
    want = linear_kl_reference(raw, eye, reference, eye, softcap=9.0)
    (derivative,) = torch.autograd.grad(want.sum(), raw)
    torch.testing.assert_close(kl.double(), want.detach(), rtol=1e-5, atol=1e-7)
    assert float((out[0].double() / HALF_SCALE - derivative).norm()) < 2e-3 * float(derivative.norm())


def test_small_gradients_keep_their_digits(device):
    case = Case(20, 16, 90, dtype=torch.float16, distance=0.3, device=device)
    case.upstream *= 1e-7
    want = case.run(linear_kl_reference)
    got = case.run(linear_kl, engine="triton")
    half = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=5e-3, atol=2 * half)


@pytest.mark.ahead
def test_shipped_kernels_compile_without_spills():
    for line in shipped("linear_kl "):
        assert line["stack"] == 0, line
        if "tiles" in line["name"] and "fp32" not in line["name"]:
            assert line["matrix"] == NEWEST[line["architecture"]], line


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_shapes_on_a_gpu(device, dtype, shared):
    case = Case(1000, 1024, 32003, dtype=dtype, shared=shared, options="all", device=device)
    check_against_float64(case)


@pytest.mark.gpu
def test_memory_on_a_gpu_is_within_the_plan(device):
    from ttpa_kernels.linear_kl.plan import plan

    R, H, V = 4096, 1024, 64000
    case = Case(R, H, V, dtype=torch.bfloat16, shared=True, device=device)
    for needs, budget in ((("hidden",), 300 << 20), (("hidden", "weight"), 800 << 20), (("weight",), 400 << 20)):
        case.hidden.requires_grad_("hidden" in needs)
        case.weight.requires_grad_("weight" in needs)
        planned = plan(
            num_rows=R,
            hidden_size=H,
            vocab_size=V,
            dtype=torch.bfloat16,
            device=device,
            needs=needs,
            budget_bytes=budget,
        )
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = case.run(linear_kl, budget_bytes=budget)
        extra = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in results)
        assert extra <= planned.workspace_bytes + (4 << 20)
