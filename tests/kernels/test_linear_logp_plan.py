from __future__ import annotations

import weakref

import pytest
import torch
from head_cases import INPUTS, budget_that_keeps, head_case, plan_of, shrink_chunks
from torch.utils._python_dispatch import TorchDispatchMode
from ttpa_kernels import linear_logp
from ttpa_kernels.linear_logp import op
from ttpa_kernels.linear_logp.op import linear_logp_stats
from ttpa_kernels.linear_logp.plan import DEFAULT_BUDGET_BYTES, choose_layout, plan


class Watch(TorchDispatchMode):
    """Counts what an operation does, also inside its operators: flops of products, and bytes of new tensors."""

    def __init__(self):
        super().__init__()
        self.flops = self.live = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inside = {"linear_logp": op._forward, "linear_logp_backward": op._backward}.get(function._opname)
        if inside is not None:
            with self:
                return inside._init_fn(*args, **kwargs)
        found = function(*args, **kwargs)
        if function._opname in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        given = {x.untyped_storage()._cdata for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                self.watch(x.untyped_storage())
        return found

    def watch(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed(_):
            self.live -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, freed)


def watched(case, operation=linear_logp, **options):
    with Watch() as watch:
        result = operation(**case, **options)
        logp = result if isinstance(result, torch.Tensor) else result[0]
        forward = watch.peak - logp.nbytes
        watch.peak = 0
        names = [name for name in INPUTS if name in case and case[name].requires_grad]
        gradients = torch.autograd.grad(logp.sum(), [case[name] for name in names]) if names else ()
        backward = watch.peak - logp.nbytes - sum(gradient.nbytes for gradient in gradients)
    return watch.flops, max(forward, backward)


UNIT = 2 * 150 * 300 * 16  # 2 R V H


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("needs", "share", "units"),
    [
        ((), 1.0, 1.0),
        (("hidden_RH",), 1.0, 2.0),
        (("hidden_RH", "weight_VH"), 1.0, 3.0),
        (("weight_VH",), 1.0, 2.0),
        (("hidden_RH", "weight_VH"), 0.0, 4.0),
        (("weight_VH",), 0.0, 3.0),
        (("hidden_RH", "weight_VH"), 0.5, None),
    ],
    ids=str,
)
def test_units(monkeypatch, dtype, needs, share, units):
    shrink_chunks(monkeypatch)
    case = head_case(150, 16, 300, dtype=dtype, needs=needs)
    budget = budget_that_keeps(share, case)
    planned = plan_of(case, budget_bytes=budget)
    if units is None:
        assert 0 < planned.kept_rows < 150 and 3.0 < planned.units < 4.0
    else:
        assert planned.units == units
    assert watched(case, budget_bytes=budget)[0] == round(planned.units * UNIT)


def test_units_of_an_adapter_on_a_frozen_head():
    """The gradient of the adapter needs the exponentials, but no product with the size of the head's gradient."""
    case = head_case(150, 16, 300, rank=2, needs=("hidden_RH", "adapter_RA", "adapter_VA"))
    flops, _ = watched(case)
    assert plan_of(case).units == 2.0
    assert flops == 2 * UNIT + 3 * UNIT * 2 // 16


def test_units_shrink_as_the_budget_grows():
    case = head_case(600, 16, 3000)
    budgets = [1 << 20, 2 << 20, 4 << 20, 6 << 20, 10 << 20]
    plans = [plan_of(case, budget_bytes=budget) for budget in budgets]
    units = [found.units for found in plans]
    assert units == sorted(units, reverse=True) and units[0] > 3.9 > units[2] > 3.1 and units[-1] == 3.0
    assert all(found.workspace_bytes <= budget for found, budget in zip(plans, budgets, strict=True))


@pytest.mark.parametrize("vocab_size", [128256, 151936])
def test_a_gpu_keeps_8192_rows_by_default(vocab_size):
    found = choose_layout(
        R=8192,
        V=vocab_size,
        X=4096,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        keeps="exponentials",
        stats=False,
        budget_bytes=None,
        engine="triton",
    )
    assert found.kept_rows == 8192


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("needs", [("hidden_RH",), ("adapter_VA",), INPUTS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspace_is_within_the_plan(monkeypatch, dtype, needs, share, stats):
    shrink_chunks(monkeypatch)
    case = head_case(130, 16, 400, dtype=dtype, bias=True, rank=3, needs=needs)
    options = {"stats": stats, "softcap": 5.0}
    budget = budget_that_keeps(share, case, **options)
    planned = plan_of(case, stats=stats, budget_bytes=budget)
    assert planned.workspace_bytes <= budget
    operation = linear_logp_stats if stats else linear_logp
    _, used = watched(case, operation, softcap=5.0, budget_bytes=budget)
    assert used <= planned.workspace_bytes


def test_workspace_of_an_entropy_gradient(monkeypatch):
    shrink_chunks(monkeypatch)
    for dtype in (torch.float32, torch.bfloat16):
        case = head_case(130, 16, 400, dtype=dtype)
        for share in (0.0, 1.0):
            budget = budget_that_keeps(share, case, stats=True)

            def entropy(budget=budget, **case):
                return linear_logp_stats(**case, budget_bytes=budget)[1].entropy_R

            assert watched(case, entropy)[1] <= budget


def test_a_default_budget_is_raised_where_it_cannot_do():
    found = plan(
        num_rows=2, hidden_size=1 << 20, vocab_size=1 << 28, dtype=torch.float32, device="cpu", needs=["weight"]
    )
    assert found.workspace_bytes > DEFAULT_BUDGET_BYTES["cpu"] and found.kept_rows == 0
    with pytest.raises(ValueError, match="raise it"):
        plan(
            num_rows=2, hidden_size=64, vocab_size=1 << 20, dtype=torch.float32, device="cpu", needs=["weight"],
            budget_bytes=1 << 20,
        )  # fmt: skip


def test_plan_refuses_unknown_needs():
    with pytest.raises(ValueError, match="'weights': give some of hidden, weight, bias, adapter"):
        plan(num_rows=1, hidden_size=1, vocab_size=1, dtype=torch.float32, device="cpu", needs=["weights"])
