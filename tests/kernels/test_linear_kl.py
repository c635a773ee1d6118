from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from ttpa_kernels.linear_kl import passes
from ttpa_kernels.linear_kl.chunks import PART_BYTES
from ttpa_kernels.linear_kl.op import linear_kl
from ttpa_kernels.linear_kl.plan import Needs, plan
from ttpa_kernels.linear_kl.reference import linear_kl_reference

SHAPES = [(1, 3, 2), (7, 40, 65), (33, 16, 257)]  # R, H, V
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "all": {"bias": True, "logit_scale": 0.5, "softcap": 3.0, "temperature": 0.7},
    "padded": {"bias": True, "temperature": 1.5, "vocab_size": "all but one"},
}


class Case:
    """Inputs of one problem: the policy is `distance` away from its reference."""

    def __init__(self, R, H, V, *, dtype=torch.float32, distance=0.3, shared=False, options="plain", device="cpu"):
        random = torch.Generator().manual_seed(R + 1000 * V)
        normal = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
        hidden, weight, bias = normal(R, H), 3 * normal(V, H) / H**0.5, normal(V)
        self.options = dict(OPTIONS[options])
        bias_given = self.options.pop("bias", False)
        if "vocab_size" in self.options:
            self.options["vocab_size"] = V - 1
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.weight = weight.to(device, dtype).requires_grad_()
        self.bias = bias.to(device, dtype).requires_grad_() if bias_given else None
        self.ref_hidden = (hidden + distance * normal(R, H)).to(device, dtype)
        self.ref_weight = None if shared else (weight + 0.1 * distance * normal(V, H)).to(device, dtype)
        self.ref_bias = normal(V).to(device, dtype) if bias_given and not shared else None
        self.upstream = normal(R).double().to(device)

    def run(self, function, **options):
        """The divergences and the gradients of hidden, weight and bias, those that are needed."""
        kl = function(
            self.hidden,
            self.weight,
            self.ref_hidden,
            self.ref_weight,
            bias_V=self.bias,
            ref_bias_V=self.ref_bias,
            **self.options,
            **options,
        )
        inputs = [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]
        return kl.detach(), *torch.autograd.grad((kl.double() * self.upstream).sum(), inputs)


def eager(hidden, weight, ref_hidden, ref_weight, **options):
    """What one writes without thinking: logits and their log-softmax in the dtype of the inputs."""
    return linear_kl_reference(hidden, weight, ref_hidden, ref_weight, dtype=hidden.dtype, **options)


def check_against_float64(case, **options):
    got, want, rough = case.run(linear_kl, **options), case.run(linear_kl_reference), case.run(eager)
    assert got[0].dtype == torch.float32 and bool((got[0] >= 0).all())
    for mine, true, theirs in zip(got, want, rough, strict=True):
        assert mine.dtype == theirs.dtype or mine is got[0]
        error, allowed = (mine.double() - true.double()).norm(), (theirs.double() - true.double()).norm()
        assert float(error) <= 1.5 * float(allowed) + 4e-7 * float(true.norm()) + 1e-6


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(shape, shared, options):
    check_against_float64(Case(*shape, shared=shared, options=options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", [1e-3, 0.1, 30.0])
def test_error_of_all_dtypes_near_and_far(dtype, distance):
    check_against_float64(Case(20, 64, 300, dtype=dtype, distance=distance, options="bias"))


@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_tiny_divergences_keep_their_digits(engine):
    # The head is the identity, so the logits are exact, and all of the error is that of the divergence.
    random = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(9, 48, generator=random)
    for distance, most in ((1e-4, 3e-3), (1e-2, 3e-5)):
        case = (logits, torch.eye(48), logits + distance * torch.randn(9, 48, generator=random))
        want = linear_kl_reference(*case)
        assert want.max() < 2 * distance**2
        torch.testing.assert_close(linear_kl(*case, engine=engine).double(), want, rtol=most, atol=0)
        assert bool(((eager(*case, None).double() - want).abs() > 10 * most * want).any())  # no matter of course


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_policy_that_is_its_reference_diverges_by_nothing(dtype, options):
    case = Case(33, 40, 257, dtype=dtype, distance=0.0, shared=True, options=options)
    got = case.run(linear_kl)
    assert all(not bool(x.any()) for x in got)


def test_huge_logits():
    case = Case(5, 8, 30, distance=1.0)
    with torch.no_grad():
        case.weight *= 1e4
        case.ref_weight *= 1e4
    got, want = case.run(linear_kl), case.run(linear_kl_reference)
    assert want[0].max() > 1e4
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_excluded_tokens():
    case = Case(6, 8, 20, options="bias")
    case.bias.data[12:] = case.ref_bias[12:] = -torch.inf
    short = Case(6, 8, 20, options="bias")
    short.options["vocab_size"] = 12
    for a, b in zip(case.run(linear_kl), short.run(linear_kl), strict=True):
        torch.testing.assert_close(a, b)
    case.ref_bias[12] = 0.0  # the reference knows a token that the policy never says
    kl, *gradients = case.run(linear_kl)
    assert bool((kl == torch.inf).all()) and all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("kept", ["all", "some", "none"])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:])
def test_budgets_and_what_needs_a_gradient(monkeypatch, needs, kept):
    case = Case(33, 8, 50, options="all")
    want = dict(zip(("kl", "hidden", "weight", "bias"), case.run(linear_kl_reference), strict=True))
    monkeypatch.setattr(passes, "choose_layout", fixed_layout(5, {"all": 33, "some": 10, "none": 0}[kept]))
    for tensor, needed in zip((case.hidden, case.weight, case.bias), needs, strict=True):
        tensor.requires_grad_(needed)
    got = case.run(linear_kl)
    names = ["kl", *(name for name, needed in zip(("hidden", "weight", "bias"), needs, strict=True) if needed)]
    for name, tensor in zip(names, got, strict=True):
        torch.testing.assert_close(tensor.double(), want[name].double(), rtol=1e-4, atol=1e-6)


def fixed_layout(chunk_rows, kept_rows):
    real = passes.choose_layout

    def choose(**arguments):
        needs = arguments["needs"]
        return real(**arguments)._replace(chunk_rows=chunk_rows, kept_rows=kept_rows if needs.head else 0)

    return choose


@pytest.mark.parametrize(
    ("needs", "budget", "units"),
    [((), None, 2), (("hidden",), None, 3), (("hidden", "weight", "bias"), None, 4), (("weight",), 200_000, None)],
)
def test_units_are_those_of_the_plan(monkeypatch, needs, budget, units):
    monkeypatch.setitem(PART_BYTES, "cpu", 1 << 12)
    case = Case(64, 16, 512, options="bias")
    R, (V, H) = len(case.hidden), case.weight.shape
    planned = plan(
        num_rows=R, hidden_size=H, vocab_size=V, dtype=torch.float32, device="cpu", needs=needs, budget_bytes=budget
    )
    assert planned.units == units if units else 3 < planned.units < 5
    problem = passes.prepare(
        *(case.hidden, case.weight, case.ref_hidden, case.ref_weight, case.bias, case.ref_bias),
        *(1.0, None, 1.0, V, budget, None, [name in needs for name in Needs._fields]),
    )
    addmm_ = {torch.ops.aten.addmm_: lambda total, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=addmm_) as counter:
        _, _, D_KV = passes.forward_pass(problem)
        if problem.needs.head:
            dweight = torch.empty(V if problem.needs.weight else 0, H)
            passes.head_gradients(problem, case.upstream.float(), D_KV, dweight, torch.empty(0))
    assert counter.get_total_flops() == planned.units * 2 * R * V * H
    assert len(D_KV) == planned.kept_rows


def test_plan_keeps_to_the_budget():
    shape = {"num_rows": 8192, "hidden_size": 4096, "vocab_size": 128256, "dtype": torch.bfloat16, "engine": "torch"}
    previous = 7.0
    for budget in (1 << 30, 3 << 30, 6 << 30, 9 << 30):
        planned = plan(**shape, device="cpu", needs=("hidden", "weight"), budget_bytes=9 * (1 << 30) + budget)
        assert planned.workspace_bytes <= 9 * (1 << 30) + budget and planned.units <= previous
        previous = planned.units
    with pytest.raises(ValueError, match="budget_bytes is 1000"):
        plan(**shape, device="cpu", budget_bytes=1000)
    with pytest.raises(ValueError, match="needs holds 'adapter'"):
        plan(**shape, device="cpu", needs=("adapter",))


def test_the_least_budget_of_the_error_works():
    case = Case(64, 16, 512)
    with pytest.raises(ValueError, match="budget_bytes is 10") as error:
        case.run(linear_kl, budget_bytes=10)
    least = int(str(error.value).split("need ")[1].split(":")[0])
    for a, b in zip(case.run(linear_kl, budget_bytes=least), case.run(linear_kl), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradcheck_of_the_operation_and_of_its_reference():
    case = Case(4, 3, 6, dtype=torch.float64, distance=1.0, options="bias")
    for function in (linear_kl, linear_kl_reference):
        assert torch.autograd.gradcheck(
            lambda h, w, b, f=function: f(
                h, w, case.ref_hidden, case.ref_weight, bias_V=b, ref_bias_V=case.ref_bias, softcap=2.0
            ),
            (case.hidden, case.weight, case.bias),
        )


def test_the_reference_is_a_constant():
    case = Case(6, 4, 9)
    case.ref_hidden.requires_grad_()
    case.run(linear_kl)
    kl = linear_kl(case.hidden.detach(), case.weight.detach(), case.ref_hidden, case.ref_weight)
    assert not kl.requires_grad


def test_backward_twice_gives_the_same():
    case = Case(6, 4, 9)
    kl = linear_kl(case.hidden, case.weight, case.ref_hidden)
    first = torch.autograd.grad(kl.sum(), (case.hidden, case.weight), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(kl.sum(), (case.hidden, case.weight))))


def test_same_bits_with_and_without_a_gradient(monkeypatch):
    case = Case(37, 16, 120)
    with torch.no_grad():
        plain = linear_kl(case.hidden, case.weight, case.ref_hidden, case.ref_weight)
    assert torch.equal(case.run(linear_kl)[0], plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.run(linear_kl)[0], plain)


def test_views_that_are_not_contiguous():
    case = Case(12, 16, 30)
    want = case.run(linear_kl)
    case.hidden = case.hidden.detach().T.contiguous().T.requires_grad_()
    case.weight = torch.cat([case.weight.detach()] * 2, dim=1)[:, :16].requires_grad_()
    case.ref_hidden = case.ref_hidden.repeat_interleave(2, dim=0)[::2]
    for a, b in zip(case.run(linear_kl), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_no_rows(engine):
    case = Case(0, 4, 9, options="bias")
    kl, dhidden, dweight, dbias = case.run(linear_kl, engine=engine)
    assert kl.shape == (0,) and dhidden.shape == (0, 4)
    assert torch.equal(dweight, torch.zeros(9, 4)) and torch.equal(dbias, torch.zeros(9))


@pytest.mark.parametrize("side", ["hidden", "ref_hidden"])
def test_a_poisoned_row_stays_alone(side):
    case = Case(6, 4, 9)
    clean = case.run(linear_kl)[0]
    getattr(case, side).data[2] = torch.nan
    kl = case.run(linear_kl)[0]
    assert bool(kl[2].isnan()) and torch.equal(kl[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


def test_operator_is_well_formed_and_compiles():
    case = Case(6, 4, 9, options="all")
    arguments = (case.hidden, case.weight, case.ref_hidden, case.ref_weight, case.bias, case.ref_bias)
    torch.library.opcheck(
        torch.ops.ttpa_kernels.linear_kl.default, (*arguments, 0.5, 3.0, 0.7, 9, None, None, [True] * 3)
    )
    compiled = torch.compile(linear_kl, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, case.run(compiled), case.run(linear_kl)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_RH": torch.zeros(6)}, ValueError, "matrices"),
        ({"ref_hidden_RH": torch.zeros(5, 4)}, ValueError, "shape of hidden_RH"),
        ({"ref_weight_VH": torch.zeros(8, 4)}, ValueError, "shape of weight_VH"),
        ({"ref_weight_VH": None}, ValueError, "shares its bias"),
        ({"ref_bias_V": torch.zeros(3)}, ValueError, "one entry for each of 9"),
        ({"ref_hidden_RH": torch.zeros(6, 4).double()}, TypeError, "give both the same"),
        ({"ref_hidden_RH": torch.zeros(6, 4, device="meta")}, ValueError, "one device"),
        ({"vocab_size": 10}, ValueError, "vocab_size is 10"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"engine": "cuda"}, ValueError, "engine is 'cuda'"),
    ],
)
def test_checks_say_what_to_do(change, error, message):
    matrices = {"hidden_RH": 6, "weight_VH": 9, "ref_hidden_RH": 6, "ref_weight_VH": 9}
    arguments = {name: torch.zeros(rows, 4) for name, rows in matrices.items()} | {"ref_bias_V": torch.zeros(9)}
    arguments |= change
    with pytest.raises(error, match=message):
        linear_kl(**arguments)
