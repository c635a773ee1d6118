from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pair_cases import MATRICES, NAMES, close, gradients, inputs, matrix, pair, reference, tree
from ttpa_kernels.linear_token_dpo.op import linear_token_dpo
from ttpa_kernels.linear_token_dpo.plan import plan
from ttpa_kernels.token_dpo.pairs import PairMatrix

pytestmark = pytest.mark.triton
STRATEGIES = {"whole": 1.0, "groups": 0.6, "least": 0.3}


def on(device, given):
    return {name: x.detach().to(device).requires_grad_(x.requires_grad) for name, x in given.items()}


def sizes(C, given, device):
    """The arguments of `plan` for what the head's gradient needs most memory for."""
    return {
        "pairs": PairMatrix.from_sparse(C),
        "hidden_size": given["hidden_RH"].shape[1],
        "vocab_size": given["weight_VH"].shape[0],
        "adapter_rank": 2,
        "dtype": given["hidden_RH"].dtype,
        "device": device,
        "needs": ("hidden", "weight", "bias", "adapter"),
        "engine": "triton",
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mixed", "singles", "no entries", "no rows"])
def test_equals_the_torch_engine_and_the_reference(name, dtype, strategy, device, poisoned):
    C = MATRICES[name]()
    given, target, ref_logp = inputs(C, H=16, V=37, dtype=dtype)
    want, want_margins = reference(given, target, ref_logp, C, softcap=9.0, logit_scale=1.2)
    true = gradients(want, given)
    ample = plan(**sizes(C, given, device)).workspace_bytes
    results = {}
    for engine in ("torch", "triton"):
        leaves = on(device, given)
        loss, margins = linear_token_dpo(
            **leaves,
            target_R=target.to(device),
            ref_logp_R=ref_logp.to(device),
            pairs=PairMatrix.from_sparse(C).to(device),
            softcap=9.0,
            logit_scale=1.2,
            budget_bytes=max(int(STRATEGIES[strategy] * ample), 60_000) if engine == "triton" else None,
            engine=engine,
        )
        results[engine] = (loss, margins.margin_P, *(x.cpu() for x in gradients(loss, leaves)))
    exact = (want, want_margins, *true)
    for mine, other, truth in zip(results["triton"], results["torch"], exact, strict=True):
        close(mine.cpu().float() if mine.dtype == torch.float64 else mine.cpu(), truth, other.cpu(), ulps=16)


@pytest.mark.parametrize(
    "needs", [(), ("hidden_RH",), ("weight_VH",), ("hidden_RH", "adapter_VA"), ("bias_V",)], ids=str
)
def test_only_what_needs_a_gradient_gets_one(needs, device, poisoned):
    C = MATRICES["mixed"]()
    given, target, ref_logp = inputs(C, H=16, needs=needs)
    want, _ = reference(given, target, ref_logp, C)
    leaves = on(device, given)
    loss, _ = linear_token_dpo(
        **leaves,
        target_R=target.to(device),
        ref_logp_R=ref_logp.to(device),
        pairs=PairMatrix.from_sparse(C).to(device),
        engine="triton",
    )
    torch.testing.assert_close(loss.double().cpu(), want, rtol=1e-6, atol=0)
    if needs:
        for mine, true in zip(gradients(loss, leaves), gradients(want, given), strict=True):
            close(mine.cpu(), true, ulps=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [(), ("hidden_RH",), NAMES[:2]], ids=len)
def test_equal_models_give_ln_2_to_the_bit(dtype, trained, device):
    C = MATRICES["mixed"]()
    given, target, _ = inputs(C, dtype=dtype, needs=trained, H=16, V=70)
    leaves = on(device, {name: given[name] for name in NAMES[:3]})
    loss, margins = linear_token_dpo(
        **leaves,
        target_R=target.to(device),
        ref_hidden_RH=leaves["hidden_RH"],
        pairs=PairMatrix.from_sparse(C).to(device),
        engine="triton",
    )
    assert loss.item() == float(np.float32(math.log(2))) and not margins.margin_P.any()


def test_fp64_is_for_the_other_engine(device):
    C = MATRICES["trees"]()
    given, target, ref_logp = inputs(C, dtype=torch.float64)
    options = {"target_R": target, "ref_logp_R": ref_logp, "pairs": PairMatrix.from_sparse(C)}
    with pytest.raises(ValueError, match="no float64"):
        linear_token_dpo(**on(device, given), **options, engine="triton")


LARGE = matrix(*[tree(3, 256)] * 3, pair(700), unused=900, shuffle=4)


def large(needs=("hidden_RH", "weight_VH")):
    generator = torch.Generator("cuda").manual_seed(0)
    R, H, V = LARGE.shape[1], 1024, 50_257
    hidden = torch.randn(R, H, device="cuda", generator=generator).bfloat16()
    weight = (torch.randn(V, H, device="cuda", generator=generator) * 4 / H**0.5).bfloat16()
    target = torch.randint(V, (R,), device="cuda", generator=generator)
    given = {"hidden_RH": hidden, "weight_VH": weight}
    return {name: x.requires_grad_(name in needs) for name, x in given.items()}, target


@pytest.mark.gpu
@pytest.mark.parametrize("needs", [("hidden_RH",), ("hidden_RH", "weight_VH")], ids=len)
def test_large_budgets_agree_and_memory_is_as_planned(needs):
    given, target = large(needs)
    pairs = PairMatrix.from_sparse(LARGE).to("cuda")
    shape = {"hidden_size": 1024, "vocab_size": 50_257, "dtype": torch.bfloat16, "device": "cuda"}
    results = []
    for budget in (3 << 30, 400 << 20):
        made = plan(pairs=pairs, **shape, needs=[name[:-3] for name in needs], online=True, budget_bytes=budget)
        assert made.units == 2 + len(needs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = linear_token_dpo(
            **given, target_R=target, ref_hidden_RH=given["hidden_RH"] * 1.01, pairs=pairs, budget_bytes=budget
        )
        gradient_bytes = sum(x.numel() * 2 for x in given.values() if x.requires_grad)
        held = torch.cuda.max_memory_allocated() - before - gradient_bytes
        assert held <= made.workspace_bytes + given["hidden_RH"].numel() * 2 + (64 << 20)  # and the workspace of cuBLAS
        results.append((loss.detach(), *torch.autograd.grad(loss, [given[name] for name in needs])))
    torch.testing.assert_close(*(result[0] for result in results), rtol=1e-6, atol=0)
    for first, second in zip(results[0][1:], results[1][1:], strict=True):
        assert (first.double() - second.double()).norm() < 4e-3 * first.double().norm()


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    given, target = large()
    pairs = PairMatrix.from_sparse(LARGE).to("cuda")

    def step(budget):
        options = {"pairs": pairs, "ref_hidden_RH": given["hidden_RH"].detach(), "budget_bytes": budget}
        loss, _ = linear_token_dpo(**given, target_R=target, **options)
        return torch.autograd.grad(loss, tuple(given.values()))

    for budget in (3 << 30, 400 << 20):
        step(budget)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(budget)
        finally:
            torch.cuda.set_sync_debug_mode("default")
