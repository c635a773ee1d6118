from __future__ import annotations

import pytest
import torch
from head_cases import INPUTS, budget_that_keeps, head_case, shrink_chunks, value_and_gradients
from ttpa_kernels import linear_logp
from ttpa_kernels.linear_logp import op
from ttpa_kernels.linear_logp.op import linear_logp_stats


def arguments(case, *, budget=None, stats=False, needs=None):
    inputs = [case.get(name) for name in ("hidden_RH", "weight_VH", "target_R", "bias_V", "adapter_RA", "adapter_VA")]
    needs = [x is not None and x.requires_grad for i, x in enumerate(inputs) if i != 2] if needs is None else needs
    return (*inputs, 1.0, 3.0, 0.9, len(case["weight_VH"]), budget, None, needs, stats)


@pytest.mark.parametrize("needs", [(), ("hidden_RH",), INPUTS], ids=str)
@pytest.mark.parametrize("stats", [False, True])
def test_opcheck(needs, stats):
    case = head_case(7, 4, 9, bias=True, rank=2, needs=needs)
    torch.library.opcheck(op._forward, arguments(case, stats=stats))


def test_opcheck_of_the_backward():
    case = head_case(7, 4, 9, bias=True)
    with torch.no_grad():
        options = arguments(case)
        kept = op._forward(*options)[3:]
        torch.library.opcheck(op._backward, (torch.randn(7), None, None, *kept, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs", [("hidden_RH",), INPUTS], ids=str)
def test_compiled_in_one_graph(needs, dtype):
    torch._dynamo.reset()
    case = head_case(12, 4, 9, dtype=dtype, bias=True, rank=2, needs=needs)
    compiled = torch.compile(linear_logp, fullgraph=True, backend="aot_eager")
    got, want = value_and_gradients(compiled, case, softcap=3.0), value_and_gradients(linear_logp, case, softcap=3.0)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_compiled_for_any_number_of_rows(monkeypatch):
    """One compilation serves every number of rows on the same side of the budget."""
    torch._dynamo.reset()
    shrink_chunks(monkeypatch)
    budget = budget_that_keeps(1.0, head_case(60, 16, 100))
    compiled = torch.compile(linear_logp, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (60, 41, 17):
        case = head_case(rows, 16, 100)
        got = value_and_gradients(compiled, case, budget_bytes=budget)
        want = value_and_gradients(linear_logp, case, budget_bytes=budget)
        assert all(torch.equal(got[name], want[name]) for name in want)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(**head_case(rows - 1, 16, 100), budget_bytes=budget)
    for rows in (90, 101):
        case = head_case(rows, 16, 100)
        got = value_and_gradients(compiled, case, budget_bytes=budget)
        want = value_and_gradients(linear_logp, case, budget_bytes=budget)
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_compiled_statistics():
    torch._dynamo.reset()
    case = head_case(12, 4, 9)

    def loss(case):
        logp, stats = linear_logp_stats(**case)
        return logp.sum() + (stats.entropy_R * stats.mean_logit_R).sum() - stats.lse_R.sum(), stats.is_top1_R

    inputs = [case["hidden_RH"], case["weight_VH"]]
    want, want_top1 = loss(case)
    want_gradients = torch.autograd.grad(want, inputs)
    got, top1 = torch.compile(loss, fullgraph=True, backend="aot_eager")(case)
    assert torch.equal(got, want) and torch.equal(top1, want_top1)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), want_gradients)


def test_under_gradient_checkpointing():
    case = head_case(12, 4, 9)
    want = value_and_gradients(linear_logp, case)

    def checkpointed(**case):
        return torch.utils.checkpoint.checkpoint(linear_logp, **case, use_reentrant=False)

    got = value_and_gradients(checkpointed, case)
    assert all(torch.equal(got[name], want[name]) for name in want)
