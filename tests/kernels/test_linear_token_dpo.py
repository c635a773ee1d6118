from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pair_cases import LOSSES, MATRICES, NAMES, close, gradients, inputs, matrix, pair, reference, tree
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from ttpa_kernels.linear_logp import chunks
from ttpa_kernels.linear_logp.passes import Gradients
from ttpa_kernels.linear_token_dpo import op, sums
from ttpa_kernels.linear_token_dpo import plan as planning
from ttpa_kernels.linear_token_dpo.op import linear_token_dpo
from ttpa_kernels.linear_token_dpo.plan import plan
from ttpa_kernels.token_dpo.pairs import PairMatrix
from ttpa_kernels.token_dpo.reference import token_dpo_reference


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """A few rows at a time pass through the elementwise steps, as in large runs."""
    for module in (chunks, planning):
        monkeypatch.setattr(module, "PART_BYTES", 1 << 10)


def least_budget(**sizes) -> int:
    """The smallest budget that `plan` accepts."""
    low, high = 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan(**sizes, budget_bytes=middle)
            high = middle
        except ValueError:
            low = middle
    return high


def budgets(C: torch.Tensor, given, *, count: int = 6) -> list[int | None]:
    """From the least to an ample one."""
    names = {"hidden_RH": "hidden", "weight_VH": "weight", "bias_V": "bias", "adapter_VA": "adapter"}
    sizes = {
        "pairs": PairMatrix.from_sparse(C),
        "hidden_size": given["hidden_RH"].shape[1],
        "vocab_size": given["weight_VH"].shape[0],
        "adapter_rank": 2,
        "dtype": given["hidden_RH"].dtype,
        "device": "cpu",
        "needs": [names[name] for name, x in given.items() if x.requires_grad and name in names],
    }
    least, ample = least_budget(**sizes), plan(**sizes).workspace_bytes
    return sorted({least + (ample - least) * i // count for i in range(count + 1)}) + [None]


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss["loss_type"])
def test_equals_the_reference(name, loss, poisoned):
    C = MATRICES[name]()
    given, target, ref_logp = inputs(C)
    P = C.shape[0]
    options = {"margin_P": torch.linspace(-1, 1, P), "pair_weight_P": torch.linspace(0.5, 2, P), "beta": 0.3, **loss}
    want, want_margins = reference(given, target, ref_logp, C, **options)
    true = gradients(want, given)
    for budget in budgets(C, given):
        got, margins = linear_token_dpo(
            **given,
            target_R=target,
            ref_logp_R=ref_logp,
            pairs=PairMatrix.from_sparse(C),
            budget_bytes=budget,
            **options,
        )
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(margins.margin_P, want_margins, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(margins.reward_P, 0.3 * margins.margin_P)
        used = (C.to_dense() != 0).any(dim=0)
        assert torch.equal(margins.logp_R.isnan(), ~used)
        for mine, exact in zip(gradients(got, given), true, strict=True):
            close(mine, exact, ulps=20)


def test_the_budgets_reach_every_strategy():
    seen = set()
    for name in ("mixed", "singles"):
        C = MATRICES[name]()
        given, _, _ = inputs(C)
        for budget in budgets(C, given):
            made = plan(
                pairs=PairMatrix.from_sparse(C),
                hidden_size=6,
                vocab_size=37,
                dtype=torch.float32,
                device="cpu",
                needs=("hidden", "weight"),
                budget_bytes=budget,
            )
            kinds = [group.kind for group in made.groups]
            seen |= {("kept", min(kinds.count("kept"), 2)), ("signed", min(kinds.count("signed"), 2))}
            seen |= {"twice" if made.units > 3 else "once", ("sums", made.sums)}
            assert budget is None or made.workspace_bytes <= budget
    assert seen >= {"twice", "once", ("kept", 1), ("kept", 2), ("signed", 0), ("signed", 1), ("signed", 2), ("sums", 1)}


@pytest.mark.parametrize("needs", [c for n in range(6) for c in itertools.combinations(NAMES, n)], ids="+".join)
def test_only_what_needs_a_gradient_gets_one(needs, poisoned):
    C = MATRICES["mixed"]()
    given, target, ref_logp = inputs(C, needs=needs)
    want, _ = reference(given, target, ref_logp, C)
    true = gradients(want, given) if needs else ()
    for budget in budgets(C, given, count=2):
        got, _ = linear_token_dpo(
            **given, target_R=target, ref_logp_R=ref_logp, pairs=PairMatrix.from_sparse(C), budget_bytes=budget
        )
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
        assert got.requires_grad == bool(needs)
        if needs:
            for mine, exact in zip(gradients(got, given), true, strict=True):
                close(mine, exact, ulps=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "head", [{}, {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3}], ids=["plain", "softcap"]
)
def test_is_as_exact_as_eager(dtype, head, poisoned):
    C = MATRICES["mixed"]()
    given, target, ref_logp = inputs(C, H=32, V=300, dtype=dtype, peak=4.0)
    want, _ = reference(given, target, ref_logp, C, **head)
    eager, _ = token_dpo_reference(eager_logp(given, target, **head), ref_logp, C.to_dense(), dtype=torch.float32)
    true, rough = gradients(want, given), gradients(eager, given)
    for budget in budgets(C, given, count=3):
        got, _ = linear_token_dpo(
            **given,
            target_R=target,
            ref_logp_R=ref_logp,
            pairs=PairMatrix.from_sparse(C),
            budget_bytes=budget,
            **head,
        )
        close(got, want, eager)
        for x, a, b, c in zip(given.values(), gradients(got, given), true, rough, strict=True):
            assert a.dtype == x.dtype and a.shape == x.shape
            close(a, b, c, ulps=4)


def eager_logp(given, target, *, logit_scale=1.0, softcap=None, temperature=1.0):
    logits = given["hidden_RH"] @ given["weight_VH"].T + given["adapter_RA"] @ given["adapter_VA"].T + given["bias_V"]
    logits = logits.float() * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, dim=1).gather(1, target[:, None])[:, 0]


def test_differences_of_fp64():
    C = MATRICES["mixed"]()
    given, target, ref_logp = inputs(C, dtype=torch.float64, H=3, V=7)
    pairs = PairMatrix.from_sparse(C)
    for budget in budgets(C, given, count=2):

        def loss(*tensors, budget=budget):
            named = dict(zip(given, tensors, strict=True))
            return linear_token_dpo(
                **named, target_R=target, ref_logp_R=ref_logp, pairs=pairs, softcap=3.0, budget_bytes=budget
            )[0]

        assert loss(*given.values()).dtype == torch.float64
        assert torch.autograd.gradcheck(loss, tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("name", ["mixed", "trees", "one pair"])
def test_reference_from_its_hidden_states(name, own_head, poisoned):
    C = MATRICES[name]()
    given, target, _ = inputs(C)
    ref_hidden = torch.randn(C.shape[1], 4 if own_head else 6)
    ref_head = {"ref_weight_VH": torch.randn(37, 4), "ref_bias_V": torch.randn(37)} if own_head else {}
    weight, bias = (
        (ref_head["ref_weight_VH"], ref_head["ref_bias_V"]) if own_head else (given["weight_VH"], given["bias_V"])
    )
    ref_logp = (
        torch.log_softmax((ref_hidden @ weight.T + bias).double(), dim=1).gather(1, target[:, None])[:, 0].detach()
    )
    want, _ = reference(given, target, ref_logp, C)
    true = gradients(want, given)
    for budget in budgets(C, given, count=3):
        got, margins = linear_token_dpo(
            **given,
            target_R=target,
            ref_hidden_RH=ref_hidden,
            pairs=PairMatrix.from_sparse(C),
            budget_bytes=None if budget is None else budget + 4000,
            **ref_head,
        )
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
        used = ~margins.logp_R.isnan()
        torch.testing.assert_close(margins.ref_logp_R[used].double(), ref_logp[used], rtol=1e-5, atol=1e-5)
        for mine, exact in zip(gradients(got, given), true, strict=True):
            close(mine, exact, ulps=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [(), ("hidden_RH",), ("hidden_RH", "weight_VH")], ids=len)
def test_equal_models_give_ln_2_to_the_bit(dtype, trained):
    C = MATRICES["mixed"]()
    given, target, _ = inputs(C, dtype=dtype, needs=trained, H=16, V=301)
    given = {name: given[name] for name in ("hidden_RH", "weight_VH", "bias_V")}
    for budget in budgets(C, given, count=4):
        loss, margins = linear_token_dpo(
            **given,
            target_R=target,
            ref_hidden_RH=given["hidden_RH"],
            pairs=PairMatrix.from_sparse(C),
            softcap=20.0,
            budget_bytes=None if budget is None else 2 * budget,
        )
        assert loss.item() == float(np.float32(math.log(2))) and not margins.margin_P.any()


def test_no_reference():
    C = MATRICES["trees"]()
    given, target, _ = inputs(C)
    want, _ = reference(given, target, None, C, beta=2.0)
    got, margins = linear_token_dpo(**given, target_R=target, pairs=PairMatrix.from_sparse(C), beta=2.0)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    assert margins.ref_logp_R is None


def test_padding_of_the_vocabulary():
    C = MATRICES["mixed"]()
    given, target, ref_logp = inputs(C)
    whole = {name: x.detach().requires_grad_() for name, x in given.items()}
    for name in ("weight_VH", "bias_V", "adapter_VA"):
        padding = torch.full((3, *given[name].shape[1:]), 1e4)
        whole[name] = torch.cat([given[name].detach(), padding]).requires_grad_()
    options = {"target_R": target, "ref_logp_R": ref_logp, "pairs": PairMatrix.from_sparse(C)}
    for budget in budgets(C, given, count=2):
        want, _ = linear_token_dpo(**given, **options, budget_bytes=budget)
        got, _ = linear_token_dpo(**whole, **options, budget_bytes=budget, vocab_size=37)
        assert torch.equal(got, want)
        for name, a, b in zip(given, gradients(got, whole), gradients(want, given), strict=True):
            padded = name in ("weight_VH", "bias_V", "adapter_VA")
            assert torch.equal(a[:37] if padded else a, b) and not (padded and a[37:].any())


def test_rows_without_a_coefficient_are_not_looked_at():
    C = MATRICES["mixed"]()
    given, target, ref_logp = inputs(C)
    pairs = PairMatrix.from_sparse(C)
    unused = pairs.structure.order_R[pairs.num_used :]
    want, _ = linear_token_dpo(**given, target_R=target, ref_logp_R=ref_logp, pairs=pairs)
    clean = gradients(want, given)
    with torch.no_grad():
        given["hidden_RH"][unused] = torch.nan
        given["adapter_RA"][unused] = torch.inf
        ref_logp[unused] = torch.nan
        target[unused] = -100
    got, _ = linear_token_dpo(**given, target_R=target, ref_logp_R=ref_logp, pairs=pairs)
    assert torch.equal(got, want)
    assert all(map(torch.equal, gradients(got, given), clean))
    assert not clean[0][unused].any()


@pytest.mark.parametrize("logits", ["huge", "equal"])
def test_extreme_logits(logits):
    C = MATRICES["mixed"]()
    given, target, ref_logp = inputs(C, peak=3000.0 if logits == "huge" else 0.0)
    with torch.no_grad():
        for name in ("bias_V", "adapter_VA"):
            given[name] *= 0.0
    want, _ = reference(given, target, ref_logp, C, beta=1e-3)
    true = gradients(want, given)
    for budget in budgets(C, given, count=2):
        got, _ = linear_token_dpo(
            **given,
            target_R=target,
            ref_logp_R=ref_logp,
            pairs=PairMatrix.from_sparse(C),
            beta=1e-3,
            budget_bytes=budget,
        )
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
        for mine, exact in zip(gradients(got, given), true, strict=True):
            close(mine, exact, ulps=200 if logits == "huge" else 20)


def test_fp16_keeps_small_gradients():
    C = MATRICES["mixed"]()
    given, target, ref_logp = inputs(C, H=16, V=64, dtype=torch.float16)
    options = {"beta": 0.1, "denominator": 50.0}
    true = gradients(reference(given, target, ref_logp, C, **options)[0], given)
    for budget in budgets(C, given, count=3):
        got, _ = linear_token_dpo(
            **given,
            target_R=target,
            ref_logp_R=ref_logp,
            pairs=PairMatrix.from_sparse(C),
            budget_bytes=budget,
            **options,
        )
        for mine, want in zip(gradients(got, given), true, strict=True):
            close(mine, want, ulps=2)


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside hold at one time."""

    def __init__(self):
        super().__init__()
        self.made, self.given, self.peak = {}, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.made:
                self.given.add(x.untyped_storage()._cdata)
        results = function(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.given:
                storage = x.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.made = {key: (reference, size) for key, (reference, size) in self.made.items() if not reference.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return results


def run_inside(mode, monkeypatch, **arguments):
    """The results of the operator whose computation, which the dispatcher would hide, runs inside a mode."""
    compute, kept = op.compute, []

    def inside(given):
        with mode:
            kept.extend(compute(given))
        return tuple(kept)

    with monkeypatch.context() as patch:
        patch.setattr(op, "compute", inside)
        linear_token_dpo(**arguments)
    return kept


def count_units(C, needs, monkeypatch, *, budget, online=False):
    """Counted and planned products, in units of `2 rows V H` flops, and the number of groups."""
    R, H, V = C.shape[1], 8, 64
    hidden, weight, target = torch.randn(R, H), torch.randn(V, H), torch.zeros(R, dtype=torch.int64)
    pairs = PairMatrix.from_sparse(C)
    sizes = {"pairs": pairs, "hidden_size": H, "vocab_size": V, "dtype": torch.float32, "device": "cpu"}
    ample = plan(**sizes, needs=needs, online=online)
    made = plan(**sizes, needs=needs, online=online, budget_bytes=int(budget * ample.workspace_bytes))
    counter = FlopCounterMode(
        display=False,
        custom_mapping={torch.ops.aten.addmm_: lambda total, a, b, **options: 2 * a[0] * a[1] * b[1]},
    )
    run_inside(
        counter,
        monkeypatch,
        hidden_RH=hidden.requires_grad_("hidden" in needs),
        weight_VH=weight.requires_grad_("weight" in needs),
        target_R=target,
        pairs=pairs,
        budget_bytes=int(budget * ample.workspace_bytes),
        **({"ref_hidden_RH": hidden.detach()} if online else {"ref_logp_R": torch.zeros(R)}),
    )
    assert made.rows == pairs.num_used
    return counter.get_total_flops() / (2 * made.rows * V * H), made.units, len(made.groups)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize(("needs", "units"), [((), 1), (("hidden",), 2), (("hidden", "weight"), 3), (("weight",), 2)])
def test_units_are_counted(needs, units, online, monkeypatch):
    C = matrix(*[tree(3, 4), pair(11), tree(2, 2), pair(13), pair(2)] * 3, unused=40, shuffle=2)
    for budget in (1.0, 0.7):
        counted, planned, groups = count_units(C, needs, monkeypatch, budget=budget, online=online)
        assert counted == planned == units + online
        assert (groups > 1) == ("weight" in needs and budget < 1)


def test_units_of_trees_that_do_not_fit(monkeypatch):
    both = ("hidden", "weight")
    counted, planned, _ = count_units(matrix(tree(3, 40), unused=5), both, monkeypatch, budget=0.6)
    assert counted == pytest.approx(planned) and 3.1 < planned < 3.9
    assert count_units(matrix(*[pair(90)] * 3), both, monkeypatch, budget=0.3) == (3, 3, 3)


@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspace_is_what_is_planned(needs, dtype, monkeypatch):
    C = matrix(*[tree(2, 10)] * 4, pair(50), unused=30, shuffle=3)
    given, target, ref_logp = inputs(C, H=16, V=3000, dtype=dtype, needs=[name + "_RH" for name in needs[:1]])
    arguments = {"hidden_RH": given["hidden_RH"], "weight_VH": given["weight_VH"].requires_grad_("weight" in needs)}
    sizes = {"pairs": PairMatrix.from_sparse(C), "hidden_size": 16, "vocab_size": 3000, "dtype": dtype, "device": "cpu"}
    ample = plan(**sizes, needs=needs).workspace_bytes
    for budget in (None, ample // 2, ample // 4):
        made = plan(**sizes, needs=needs, budget_bytes=budget)
        held = Held()
        arguments |= {"target_R": target, "ref_logp_R": ref_logp, "pairs": sizes["pairs"], "budget_bytes": budget}
        results = run_inside(held, monkeypatch, **arguments)
        beyond = held.peak - sum(x.numel() * x.element_size() for x in results)
        assert budget is None or made.workspace_bytes <= budget
        assert made.workspace_bytes / 3 < beyond <= made.workspace_bytes


def test_backward_twice_and_autocast():
    C = MATRICES["trees"]()
    given, target, ref_logp = inputs(C)
    options = {"target_R": target, "ref_logp_R": ref_logp, "pairs": PairMatrix.from_sparse(C)}
    loss, _ = linear_token_dpo(**given, **options)
    first = torch.autograd.grad(loss, given.values(), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, given.values())))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, _ = linear_token_dpo(**given, **options)
    assert torch.equal(again, loss) and all(map(torch.equal, first, torch.autograd.grad(again, given.values())))


def test_a_second_derivative_is_refused():
    C = MATRICES["trees"]()
    given, target, ref_logp = inputs(C)
    loss, _ = linear_token_dpo(**given, target_R=target, ref_logp_R=ref_logp, pairs=PairMatrix.from_sparse(C))
    (gradient,) = torch.autograd.grad(loss, given["hidden_RH"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(gradient.sum(), given["hidden_RH"])


def test_custom_op_and_compile():
    C = MATRICES[
        "trees"
    ]()  # of rows that are not computed the log-probability is NaN, which opcheck takes for an error
    given, target, ref_logp = inputs(C)
    pairs = PairMatrix.from_sparse(C)
    calls = []
    op._forward, forward = (lambda *arguments: calls.append(arguments) or forward(*arguments)), op._forward
    try:
        linear_token_dpo(**given, target_R=target, ref_logp_R=ref_logp, pairs=pairs)
    finally:
        op._forward = forward
    torch.library.opcheck(op._forward, calls[0])

    def loss(hidden_RH, weight_VH):
        options = {"target_R": target, "ref_logp_R": ref_logp, "pairs": pairs}
        loss, margins = linear_token_dpo(hidden_RH=2 * hidden_RH, weight_VH=weight_VH, **options)
        return loss + 0 * margins.mean_reward

    tensors = given["hidden_RH"], given["weight_VH"]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), loss(*tensors))
    got, want = (torch.autograd.grad(function(*tensors), tensors) for function in (compiled, loss))
    assert all(map(torch.equal, got, want))


def test_sharded_weights_are_gathered():
    C = MATRICES["mixed"]()
    given, target, ref_logp = inputs(C)
    options = {"target_R": target, "ref_logp_R": ref_logp, "pairs": PairMatrix.from_sparse(C)}
    want, _ = linear_token_dpo(**given, **options)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = {name: x.detach().requires_grad_() for name, x in given.items()}
        for name in ("weight_VH", "bias_V", "adapter_VA"):
            whole[name] = distribute_tensor(given[name].detach(), mesh, [Shard(0)]).requires_grad_()
        got, _ = linear_token_dpo(**whole, **options)
        assert torch.equal(got, want)
        for x, mine, true in zip(whole.values(), gradients(got, whole), gradients(want, given), strict=True):
            assert type(mine) is type(x.detach())
            assert torch.equal(mine.full_tensor() if isinstance(mine, DTensor) else mine, true)
        with pytest.raises(ValueError, match="hidden_RH is a DTensor"):
            hidden = distribute_tensor(given["hidden_RH"].detach(), mesh, [Shard(0)])
            linear_token_dpo(**{**given, "hidden_RH": hidden}, **options)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_RH": torch.zeros(4, 3)}, ValueError, "same width"),
        ({"hidden_RH": torch.zeros(3, 2), "target_R": torch.zeros(3, dtype=torch.int64)}, ValueError, "C 4"),
        ({"target_R": torch.tensor([0, 9, 0, 0])}, ValueError, r"vocabulary is \[0, 5\)"),
        ({"target_R": torch.zeros(4)}, TypeError, "int64"),
        ({"ref_logp_R": torch.zeros(3)}, ValueError, "ref_logp_R"),
        ({"ref_hidden_RH": torch.zeros(4, 2)}, ValueError, "one of them"),
        ({"ref_logp_R": None, "ref_hidden_RH": torch.zeros(3, 2)}, ValueError, "same rows"),
        ({"ref_logp_R": None, "ref_hidden_RH": torch.zeros(4, 3)}, ValueError, "of the reference"),
        ({"ref_logp_R": None, "ref_hidden_RH": torch.zeros(4, 2).double()}, TypeError, "ref_hidden_RH is"),
        ({"ref_weight_VH": torch.zeros(5, 2)}, ValueError, "belong to ref_hidden_RH"),
        ({"ref_logp_R": None, "ref_hidden_RH": torch.zeros(4, 2), "ref_bias_V": torch.zeros(5)}, ValueError, "without"),
        ({"loss_type": "dpo"}, ValueError, "not one of"),
        ({"margin_P": torch.zeros(1)}, ValueError, "C has 2 pairs"),
        ({"budget_bytes": 10, "weight_VH": torch.zeros(5, 2, requires_grad=True)}, ValueError, "at the least"),
        ({"engine": "numpy"}, ValueError, "engine is 'numpy'"),
    ],
)
def test_checks_say_what_to_do(change, error, message):
    good = {
        "hidden_RH": torch.zeros(4, 2),
        "weight_VH": torch.zeros(5, 2),
        "target_R": torch.zeros(4, dtype=torch.int64),
        "pairs": PairMatrix.from_sparse(matrix(pair(2), pair(2))),
        "ref_logp_R": torch.zeros(4),
    }
    with pytest.raises(error, match=message):
        linear_token_dpo(**{**good, **change})


def test_plan_checks_what_it_is_asked():
    sizes = {"pairs": PairMatrix.from_sparse(matrix(pair(4))), "hidden_size": 4, "vocab_size": 9}
    with pytest.raises(ValueError, match="needs holds 'head'"):
        plan(**sizes, dtype=torch.float32, device="cpu", needs=("head",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-6, 0.0])
@pytest.mark.parametrize("complete", [True, False])
def test_sums_of_half_precision_factors(dtype, size, complete, monkeypatch):
    """As on a GPU, where the factors of products stay in half precision; small weights keep their digits in fp16."""
    monkeypatch.setattr(sums, "operand", lambda x: x)
    monkeypatch.setattr(sums, "product", lambda a, b, out=None: a.float() @ b.float())
    monkeypatch.setattr(sums, "add_product_", lambda total, a, b: total.add_(a.float() @ b.float()))
    generator = torch.Generator().manual_seed(0)
    E = torch.rand(12, 9, generator=generator).mul(2**14 if dtype == torch.float16 else 1).to(dtype)
    hidden = torch.randn(12, 4, generator=generator).to(dtype)
    factor = torch.full((12,), -(2.0**-14) if dtype == torch.float16 else -0.1)
    weight = size * torch.randn(12, generator=generator)
    none = torch.empty(0)
    out = Gradients(none, torch.empty(9, 4, dtype=dtype), torch.empty(9, dtype=dtype), none, none)
    total = sums.HeadSums(chunks.Head(E.T), chunks.Rows(hidden, none), out, complete=complete)
    blocks = [slice(0, 12)] if complete else [slice(0, 4), slice(4, 9), slice(9, 12)]
    slopes = torch.ones(12, dtype=torch.float64)
    for i, block in enumerate(blocks):
        signed = not complete and i < 2  # the second one has a sum of its own
        total.open(signed=signed)
        total.add(block, E[block], factor[block], weight[block])
        if signed:
            slopes[block] = 0.5 - i
            total.scale(slopes[block][:1])
    total.finish()
    a = (factor.double() * weight * slopes)[:, None]
    for mine, true in ((out.weight_VH, E.double().T @ (a * hidden)), (out.bias_V, (E.double().T @ a)[:, 0])):
        close(mine, true, true.to(dtype), ulps=2)
