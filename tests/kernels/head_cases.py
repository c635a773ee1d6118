"""Inputs of operations on the head, and the two computations that results are compared with: fp64, and eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ttpa_kernels.linear_logp import chunks, plan
from ttpa_kernels.linear_logp.reference import reference_logits

INPUTS = ("hidden_RH", "weight_VH", "bias_V", "adapter_RA", "adapter_VA")


def head_case(
    R: int,
    H: int,
    V: int,
    *,
    dtype: torch.dtype = torch.float32,
    peak: float = 1.0,
    bias: bool = False,
    rank: int = 0,
    needs: tuple[str, ...] = INPUTS,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Tensors of `linear_logp` by name, the last token among the targets; those in `needs` require a gradient."""
    generator = torch.Generator().manual_seed(R + 1000 * V)
    case = {
        "hidden_RH": torch.randn(R, H, generator=generator),
        "weight_VH": torch.randn(V, H, generator=generator) * peak / H**0.5,
        "target_R": torch.randint(V, (R,), generator=generator),
    }
    if R:
        case["target_R"][-1] = V - 1
    if bias:
        case["bias_V"] = torch.randn(V, generator=generator)
    if rank:
        case["adapter_RA"] = torch.randn(R, rank, generator=generator)
        case["adapter_VA"] = torch.randn(V, rank, generator=generator) / rank**0.5
    for name in INPUTS:
        if name in case:
            case[name] = case[name].to(device, dtype).requires_grad_(name in needs)
    case["target_R"] = case["target_R"].to(device)
    return case


def upstream(R: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """An upstream gradient that differs from row to row, fp64."""
    return torch.randn(R, generator=torch.Generator().manual_seed(R), dtype=torch.float64).to(device)


def eager_logits(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits as eager PyTorch computes them: products in the dtype of the inputs, what follows in fp32 or fp64."""
    bias_V, u_RA, B_VA = (options.get(name) for name in ("bias_V", "adapter_RA", "adapter_VA"))
    x_RV = torch.nn.functional.linear(hidden_RH, weight_VH, bias_V)
    if u_RA is not None:
        x_RV = x_RV + u_RA @ B_VA.T
    x_RV = options.get("logit_scale", 1.0) * x_RV[:, : options.get("vocab_size")]
    x_RV = x_RV.to(torch.promote_types(x_RV.dtype, torch.float32))
    if options.get("softcap") is not None:
        x_RV = options["softcap"] * torch.tanh(x_RV / options["softcap"])
    return x_RV / options.get("temperature", 1.0)


def exact_logits(**case: Any) -> torch.Tensor:
    """Logits in fp64."""
    return reference_logits(**case)


def logp_from(logits: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The operation `linear_logp` made of a function for all logits."""

    def logp(target_R: torch.Tensor, **case: Any) -> torch.Tensor:
        return torch.log_softmax(logits(**case), dim=1).gather(1, target_R[:, None])[:, 0]

    return logp


def value_and_gradients(operation: Callable[..., torch.Tensor], case: dict[str, Any], **options: Any) -> dict:
    """The result, and the gradients under `upstream`, by name."""
    result = operation(**case, **options)
    names = [name for name in INPUTS if name in case and case[name].requires_grad]
    found = {"result": result.detach()}
    if names:
        total = (result.double() * upstream(len(result), result.device)).sum()
        found |= zip(names, torch.autograd.grad(total, [case[name] for name in names]), strict=True)
    return found


def assert_as_exact_as_eager(got: dict, exact: dict, eager: dict, *, ulps: float = 8.0) -> None:
    """Each error in the 2-norm is at most 1.5 times that of eager PyTorch, plus a few fp32 roundings."""
    assert got.keys() == exact.keys() == eager.keys()
    for name, value in got.items():
        truth = exact[name].double()
        error, allowed = (value.double() - truth).norm(), 1.5 * (eager[name].double() - truth).norm()
        precision = torch.finfo(torch.promote_types(value.dtype, torch.float32)).eps
        allowed = allowed + ulps * precision * truth.norm()
        assert bool(error <= allowed), f"{name}: error {float(error):.3e}, allowed {float(allowed):.3e}"


def shrink_chunks(monkeypatch: Any) -> None:
    """Many chunks, parts and blocks also in small cases."""
    for sizes in (plan.CHUNK_BYTES, plan.TILE_BYTES):
        for kind in ("cpu", "cuda"):
            monkeypatch.setitem(sizes, kind, 9000)
    for module in (plan, chunks):
        monkeypatch.setattr(module, "PART_BYTES", 3000)
        monkeypatch.setattr(module, "GPU_PART_BYTES", 3000)
        monkeypatch.setattr(module, "COPY_BYTES", 2000)


def plan_of(case: dict[str, Any], *, vocab_size: int | None = None, **options: Any) -> plan.Plan:
    """The plan for a case, with the engine 'torch' unless another is given."""
    groups = {
        "hidden": ("hidden_RH", "adapter_RA"),
        "weight": ("weight_VH",),
        "bias": ("bias_V",),
        "adapter": ("adapter_VA",),
    }
    needs = [need for need, names in groups.items() if any(n in case and case[n].requires_grad for n in names)]
    return plan.plan(
        num_rows=len(case["hidden_RH"]),
        hidden_size=case["hidden_RH"].shape[1],
        vocab_size=vocab_size or len(case["weight_VH"]),
        dtype=case["hidden_RH"].dtype,
        device=case["hidden_RH"].device,
        needs=needs,
        adapter_rank=case["adapter_VA"].shape[1] if "adapter_VA" in case else 0,
        **{name: options[name] for name in ("stats", "budget_bytes") if name in options},
        engine=options.get("engine", "torch"),
    )


def budget_that_keeps(share: float, case: dict[str, Any], **options: Any) -> int:
    """The smallest budget with which at least this share of the rows is kept."""
    low, high = 1, 1 << 40
    while low < high:
        middle = (low + high) // 2
        try:
            enough = plan_of(case, **options | {"budget_bytes": middle}).kept_rows >= share * len(case["hidden_RH"])
        except ValueError:
            enough = False
        low, high = (low, middle) if enough else (middle + 1, high)
    return low
