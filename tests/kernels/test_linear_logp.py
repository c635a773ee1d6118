from __future__ import annotations

import itertools

import pytest
import torch
from head_cases import (
    INPUTS,
    assert_as_exact_as_eager,
    budget_that_keeps,
    eager_logits,
    exact_logits,
    head_case,
    logp_from,
    shrink_chunks,
    upstream,
    value_and_gradients,
)
from ttpa_kernels import linear_logp
from ttpa_kernels.linear_logp import chunks, passes
from ttpa_kernels.linear_logp.op import linear_logp_stats
from ttpa_kernels.linear_logp.reference import head_stats_reference, linear_logp_reference

exact, eager = logp_from(exact_logits), logp_from(eager_logits)
OPTIONS = [
    {},
    {"logit_scale": 0.25, "temperature": 0.7},
    {"softcap": 3.0},
    {"softcap": 2.0, "logit_scale": -1.5, "temperature": 1.3, "vocab_size": -3},
]


@pytest.fixture
def small_chunks(monkeypatch):
    shrink_chunks(monkeypatch)


def resolved(case: dict, options: dict) -> dict:
    if "vocab_size" not in options:
        return options
    V = len(case["weight_VH"]) + options["vocab_size"]
    case["target_R"].clamp_(max=V - 1)
    return options | {"vocab_size": V}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("share", [1.0, 0.4, 0.0], ids=["kept", "half", "recomputed"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("R", "H", "V"), [(1, 3, 2), (43, 16, 101), (64, 32, 257)])
def test_as_exact_as_eager(poisoned, share, options, dtype, R, H, V):
    if V < 4 and "vocab_size" in options:
        options = options | {"vocab_size": -1}
    case = head_case(R, H, V, dtype=dtype, peak=4.0, bias=V != 101, rank=3 if V == 257 else 0)
    options = resolved(case, options)
    want, plain = value_and_gradients(exact, case, **options), value_and_gradients(eager, case, **options)
    budget = budget_that_keeps(share, case, **options)
    got = value_and_gradients(linear_logp, case, **options, budget_bytes=budget)
    assert got["result"].dtype == torch.float32 and got["weight_VH"].dtype == dtype
    assert_as_exact_as_eager(got, want, plain)
    assert bool((got["weight_VH"][options.get("vocab_size") or V :] == 0).all())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 2.0**-23])
def test_half_precision_factors_as_on_a_gpu(monkeypatch, poisoned, share, options, dtype, size):
    """With products as a GPU has them, of half-precision factors into fp32, and upstream gradients of any size."""

    def multiply(a, b, *, out=None):
        assert a.dtype == b.dtype == dtype
        return torch.mm(a.float(), b.float(), out=out)

    for module in (chunks, passes):
        monkeypatch.setattr(module, "operand", lambda x: x)
        monkeypatch.setattr(module, "product", multiply)
        monkeypatch.setattr(module, "add_product_", lambda total, a, b: total.add_(multiply(a, b)))
    case = head_case(43, 16, 101, dtype=dtype, peak=4.0, bias=True, rank=3)
    options = resolved(case, options)

    def scaled(operation):
        return lambda **inputs: size * operation(**inputs)

    found = [
        value_and_gradients(scaled(operation), case, **options, **budget)
        for operation, budget in (
            (linear_logp, {"budget_bytes": budget_that_keeps(share, case, **options)}),
            (exact, {}),
            (eager, {}),
        )
    ]
    for gradients in found:  # below what fp16 holds, only that they are not broken
        assert all(bool(value.isfinite().all()) for value in gradients.values())
    if size == 1.0 or dtype == torch.bfloat16:
        assert_as_exact_as_eager(*found)


def test_fp16_keeps_small_gradients_for_a_scaled_loss():
    """A confident token has a tiny gradient, which the scale of the loss brings back to where fp16 holds it."""
    case = head_case(5, 4, 9, dtype=torch.float16, needs=("hidden_RH",))
    with torch.no_grad():
        case["weight_VH"].copy_(torch.eye(9, 4))
        case["hidden_RH"].copy_(torch.eye(4)[0] * 15.0)
        case["target_R"].fill_(0)
    scale = 2.0**16
    (got,) = torch.autograd.grad((linear_logp(**case) * scale).sum(), case["hidden_RH"])
    (want,) = torch.autograd.grad((exact(**case) * scale).sum(), case["hidden_RH"])
    torch.testing.assert_close(got, want, rtol=2e-3, atol=0.0)


@pytest.mark.triton
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("dtype", "needs", "share", "options"),
    [
        (torch.float32, INPUTS, 0.4, {"softcap": 5.0, "temperature": 0.8}),
        (torch.float32, ("hidden_RH", "adapter_RA"), 1.0, {"vocab_size": -3}),
        (torch.bfloat16, INPUTS, 1.0, {"logit_scale": 0.5}),
        (torch.bfloat16, INPUTS, 0.0, {"softcap": 5.0}),
        (torch.bfloat16, ("hidden_RH",), 1.0, {}),
        (torch.float16, INPUTS, 0.4, {"vocab_size": -3}),
    ],
    ids=str,
)
def test_the_triton_engine_as_exact_as_eager(poisoned, device, dtype, needs, share, options):
    case = head_case(43, 16, 101, dtype=dtype, peak=4.0, bias=True, rank=3, needs=needs, device=device)
    options = resolved(case, options)
    want, plain = value_and_gradients(exact, case, **options), value_and_gradients(eager, case, **options)
    budget = budget_that_keeps(share, case, **options, engine="triton")
    got = value_and_gradients(linear_logp, case, **options, budget_bytes=budget, engine="triton")
    assert_as_exact_as_eager(got, want, plain)
    with torch.no_grad():
        assert torch.equal(linear_logp(**case, **options, budget_bytes=budget, engine="triton"), got["result"])


@pytest.mark.triton
def test_statistics_of_the_triton_engine(device):
    case = head_case(21, 16, 101, peak=4.0, device=device)
    z = exact_logits(**{name: value for name, value in case.items() if name != "target_R"})
    want = head_stats_reference(z, case["target_R"])
    _, got = linear_logp_stats(**case, engine="triton")
    inputs = [case["hidden_RH"], case["weight_VH"]]
    for mine, true in zip(got[:4], want[:4], strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=2e-6)
    assert torch.equal(got.is_top1_R, want[4])
    g = upstream(21, device)
    mine = torch.autograd.grad(((got.entropy_R - 0.5 * got.lse_R) * g).sum(), inputs)
    true = torch.autograd.grad(((want[1] - 0.5 * want[0]) * g).sum(), inputs)
    torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)


def test_fp64_is_for_the_engine_torch():
    with pytest.raises(ValueError, match="use engine='torch'"):
        linear_logp(**head_case(3, 4, 5, dtype=torch.float64), engine="triton")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("needs", [names for n in range(6) for names in itertools.combinations(INPUTS, n)], ids=str)
def test_every_combination_of_what_needs_a_gradient(poisoned, share, needs):
    case = head_case(43, 16, 101, bias=True, rank=3, needs=needs)
    want, plain = value_and_gradients(exact, case), value_and_gradients(eager, case)
    got = value_and_gradients(linear_logp, case, budget_bytes=budget_that_keeps(share, case))
    assert_as_exact_as_eager(got, want, plain)


def test_peaked_logits_stay_exact():
    """Logits of up to 30 and one confident target a row: what a trained model gives."""
    case = head_case(256, 64, 4000, peak=6.0)
    case["target_R"][:200] = (case["hidden_RH"] @ case["weight_VH"].T).argmax(dim=1)[:200]
    want, plain = value_and_gradients(exact, case), value_and_gradients(eager, case)
    got = value_and_gradients(linear_logp, case)
    assert float((got["result"] - want["result"]).square().mean().sqrt()) < 2e-6
    assert bool((got["result"] <= 0).all())
    assert_as_exact_as_eager(got, want, plain)


@pytest.mark.parametrize("share", [1.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["huge", "equal", "alone"])
def test_extreme_logits(share, dtype, kind):
    case = head_case(20, 16, 50, dtype=dtype, peak=3000.0 if kind == "huge" else 1.0)
    with torch.no_grad():
        if kind == "equal":
            case["weight_VH"].copy_(case["weight_VH"][0].clone())
        if kind == "alone":  # all probability on the target, to many more digits than the dtype has
            case["hidden_RH"].copy_(case["hidden_RH"][0].clone())
            case["weight_VH"][7] = 40 * case["hidden_RH"][0]
            case["target_R"].fill_(7)
    want, plain = value_and_gradients(exact, case), value_and_gradients(eager, case)
    got = value_and_gradients(linear_logp, case, budget_bytes=budget_that_keeps(share, case))
    assert all(bool(value.isfinite().all()) for value in got.values())
    assert_as_exact_as_eager(got, want, plain)


def test_banned_tokens():
    """A bias of -inf takes a token out."""
    case = head_case(9, 8, 20, bias=True, needs=("hidden_RH", "weight_VH"))
    case["bias_V"][3:6] = -torch.inf
    case["target_R"].fill_(2)
    want = value_and_gradients(exact, case)
    got = value_and_gradients(linear_logp, case)
    torch.testing.assert_close(got, {name: value.float() for name, value in want.items()})
    logp, stats = linear_logp_stats(**case)
    torch.testing.assert_close(logp.double(), want["result"], rtol=1e-5, atol=1e-6)
    reference = head_stats_reference(
        exact_logits(**{k: v for k, v in case.items() if k != "target_R"}), case["target_R"]
    )
    torch.testing.assert_close(stats.entropy_R.double(), reference[1], rtol=1e-5, atol=1e-6)
    stats.entropy_R.sum().backward()
    assert bool(case["hidden_RH"].grad.isfinite().all())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_statistics_and_their_gradients(poisoned, options, dtype, frozen):
    R = 43
    needs = ("hidden_RH", "adapter_RA") if frozen else INPUTS
    case = head_case(R, 16, 101, dtype=dtype, peak=4.0, bias=True, rank=3, needs=needs)
    options = resolved(case, options)
    case["target_R"][:20] = exact_logits(**{k: v for k, v in (case | options).items() if k != "target_R"}).argmax(1)[
        :20
    ]

    def run(operation, weights):
        found = operation()
        total = sum((w * upstream(R) * part.double()).sum() for w, part in zip(weights, found[:3], strict=True) if w)
        names = [name for name in INPUTS if name in case and case[name].requires_grad]
        gradients = torch.autograd.grad(total, [case[name] for name in names], retain_graph=True)
        values = {f"value{i}": part.detach() for i, part in enumerate(found[:5])}
        return values | dict(zip(names, gradients, strict=True)), found[5]

    def from_logits(logits):
        z = logits(**{k: v for k, v in (case | options).items() if k != "target_R"})
        lse, entropy, square, mean, top1 = head_stats_reference(z, case["target_R"])
        return z.log_softmax(1).gather(1, case["target_R"][:, None])[:, 0], lse, entropy, square, mean, top1

    def operation():
        logp, stats = linear_logp_stats(**case, **options)
        return logp, *stats

    for weights in ((1.0, 0.5, 0.0), (0.3, 0.0, 2.0), (0.0, 0.0, 1.0), (0.0, 1.0, -1.0)):
        got, got_top1 = run(operation, weights)
        want, want_top1 = run(lambda: from_logits(exact_logits), weights)
        plain, _ = run(lambda: from_logits(eager_logits), weights)
        assert_as_exact_as_eager(got, want, plain, ulps=16)
        assert torch.equal(got_top1, want_top1)


def test_statistics_without_a_gradient_cost_nothing_more():
    case = head_case(12, 8, 30)
    logp, stats = linear_logp_stats(**case)
    assert not any(part.requires_grad for part in stats[2:])
    got = torch.autograd.grad(logp.sum(), [case["hidden_RH"], case["weight_VH"]])
    want = torch.autograd.grad(linear_logp(**case).sum(), [case["hidden_RH"], case["weight_VH"]])
    assert all(map(torch.equal, got, want))


def test_first_of_equal_largest_logits_is_top():
    hidden, weight = torch.ones(3, 2), torch.tensor([[1.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    _, stats = linear_logp_stats(hidden, weight, torch.tensor([0, 1, 2]))
    assert stats.is_top1_R.tolist() == [False, True, False]


@pytest.mark.parametrize("stats", [False, True])
def test_gradcheck(stats):
    case = head_case(4, 3, 6, dtype=torch.float64, bias=True, rank=2)
    target = case.pop("target_R")
    names = list(case)

    def function(*tensors):
        inputs = dict(zip(names, tensors, strict=True), target_R=target, softcap=2.0, temperature=0.8)
        if not stats:
            return linear_logp(**inputs)
        logp, found = linear_logp_stats(**inputs)
        return logp, found.lse_R, found.entropy_R

    assert torch.autograd.gradcheck(function, tuple(case.values()))


def test_gradcheck_of_the_reference():
    case = head_case(4, 3, 6, dtype=torch.float64)
    function = lambda h, w: linear_logp_reference(h, w, case["target_R"], softcap=2.0)  # noqa: E731
    assert torch.autograd.gradcheck(function, (case["hidden_RH"], case["weight_VH"]))


def test_backward_twice_gives_the_same():
    case = head_case(6, 4, 9)
    inputs = [case["hidden_RH"], case["weight_VH"]]
    logp = linear_logp(**case)
    first = torch.autograd.grad(logp.sum(), inputs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(logp.sum(), inputs)))


def test_no_second_derivative():
    case = head_case(6, 4, 9)
    (gradient,) = torch.autograd.grad(linear_logp(**case).sum(), case["hidden_RH"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_whatever_needs_a_gradient(dtype):
    """So that a policy that equals its reference has log-ratios of exactly zero."""
    case = head_case(77, 16, 120, dtype=dtype, bias=True, peak=3.0)
    with torch.no_grad():
        plain = linear_logp(**case)
    for needs in (INPUTS, ("hidden_RH",), ("weight_VH",)):
        for name in ("hidden_RH", "weight_VH", "bias_V"):
            case[name].requires_grad_(name in needs)
        for share in (0.0, 0.4, 1.0):
            assert torch.equal(linear_logp(**case, budget_bytes=max(40_000, budget_that_keeps(share, case))), plain)
        assert torch.equal(linear_logp_stats(**case)[0], plain)


def test_autocast_changes_nothing():
    case = head_case(37, 16, 120)
    plain = value_and_gradients(linear_logp, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = value_and_gradients(linear_logp, case)
    assert all(torch.equal(plain[name], inside[name]) for name in plain)


def test_inputs_may_lie_anyhow_in_memory():
    case = head_case(10, 6, 15)
    plain = value_and_gradients(linear_logp, case)
    for name in ("hidden_RH", "weight_VH"):
        case[name] = case[name].detach().T.contiguous().T.requires_grad_()
    case["target_R"] = case["target_R"].repeat_interleave(2)[::2]
    torch.testing.assert_close(value_and_gradients(linear_logp, case), plain)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_rows(frozen):
    case = head_case(0, 4, 9, bias=True, needs=("hidden_RH",) if frozen else INPUTS)
    found = value_and_gradients(linear_logp, case)
    assert found["result"].shape == (0,) and found["hidden_RH"].shape == (0, 4)
    if not frozen:
        assert torch.equal(found["weight_VH"], torch.zeros(9, 4)) and torch.equal(found["bias_V"], torch.zeros(9))


def test_a_poisoned_row_stays_alone():
    case = head_case(6, 4, 9)
    clean = linear_logp(**case)
    hidden = case["hidden_RH"].detach().clone()
    hidden[2] = torch.nan
    logp = linear_logp(**(case | {"hidden_RH": hidden}))
    assert bool(logp[2].isnan()) and torch.equal(logp[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


def test_a_row_without_upstream_gradient_gets_none():
    case = head_case(6, 4, 9)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 1.0])
    (gradient,) = torch.autograd.grad((linear_logp(**case) * weights).sum(), case["hidden_RH"])
    assert gradient.any(dim=1).tolist() == (weights != 0).tolist()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_RH": torch.zeros(4)}, ValueError, "matrices"),
        ({"hidden_RH": torch.zeros(6, 3)}, ValueError, "same width"),
        ({"weight_VH": torch.zeros(0, 4)}, ValueError, "at least one token"),
        ({"target_R": torch.zeros(2, dtype=torch.int64)}, ValueError, "one entry for each of 6 rows"),
        ({"target_R": torch.zeros(6, dtype=torch.int32)}, TypeError, "convert it to torch.int64"),
        ({"target_R": torch.full((6,), -1)}, ValueError, r"vocabulary is \[0, 9\)"),
        ({"target_R": torch.full((6,), 9)}, ValueError, r"vocabulary is \[0, 9\)"),
        ({"target_R": torch.full((6,), 8), "vocab_size": 8}, ValueError, r"vocabulary is \[0, 8\)"),
        ({"target_R": torch.zeros(6, dtype=torch.int64, device="meta")}, ValueError, "move them to one device"),
        ({"weight_VH": torch.zeros(9, 4, device="meta")}, ValueError, "move them to one device"),
        ({"hidden_RH": torch.zeros(6, 4, dtype=torch.float64)}, TypeError, "give all the same one of"),
        ({"bias_V": torch.zeros(8)}, ValueError, "one entry for each of 9 tokens"),
        ({"bias_V": torch.zeros(9, dtype=torch.bfloat16)}, TypeError, "bias_V is torch.bfloat16"),
        ({"adapter_RA": torch.zeros(6, 2)}, ValueError, "two halves"),
        ({"adapter_VA": torch.zeros(9, 2)}, ValueError, "two halves"),
        ({"adapter_RA": torch.zeros(6, 2), "adapter_VA": torch.zeros(9, 3)}, ValueError, "same rank"),
        ({"adapter_RA": torch.zeros(5, 2), "adapter_VA": torch.zeros(9, 2)}, ValueError, "must have 6 rows"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale is inf"),
        ({"vocab_size": 10}, ValueError, r"lies in \[1, 9\]"),
        ({"vocab_size": 0}, ValueError, r"lies in \[1, 9\]"),
        ({"budget_bytes": 10}, ValueError, "need [0-9]+: raise it"),
        ({"engine": "cuda"}, ValueError, "'triton', 'torch', or None"),
    ],
    ids=str,
)
def test_errors_say_what_to_change(change, error, message):
    case = head_case(6, 4, 9)
    with pytest.raises(error, match=message):
        linear_logp(**(case | change))
