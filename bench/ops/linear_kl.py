"""KL(reference || policy) of each row from two hidden states and two heads, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from bench import peers
from bench.inputs import Head, HeadShape, peaked_head
from bench.measure import Case, Results, Run, Side
from bench.ops import Size
from bench.ops.linear_logp import BF16, FP32, MODES, Need, gradient_names, leaves, plain_products
from bench.peers import load


@dataclass(frozen=True)
class TwoHeads:
    """The head of the policy, and the hidden states and head of the reference (None: it shares the head)."""

    head: Head
    ref_hidden_RH: torch.Tensor
    ref_weight_VH: torch.Tensor | None

    @property
    def reference_head(self) -> torch.Tensor:
        return self.head.weight_VH if self.ref_weight_VH is None else self.ref_weight_VH


CASES: dict[Size, list[tuple[HeadShape, str]]] = {
    "toy": [(HeadShape(16, 32, 160, FP32), "trainable")],
    "cpu": [(HeadShape(512, 512, 32000, FP32), "trainable")],
    "gpu": [
        (HeadShape(4096, 4096, 128256, BF16), "trainable"),
        (HeadShape(4096, 4096, 128256, BF16), "frozen"),
    ],
    "errors": [(HeadShape(256, 4096, 128256, BF16), "trainable")],
}


def cases(size: Size) -> list[Case]:
    return [make_case(shape, mode) for shape, mode in CASES[size]]


def make_case(shape: HeadShape, mode: str) -> Case:
    """A trainable head has a reference head of its own, a frozen one is shared."""
    needs, minimum = MODES[mode]
    return Case(
        op="linear_kl",
        name=f"{shape}-{mode}",
        inputs=partial(_inputs, shape, mode == "trainable"),
        sides={
            "ttpa": Side(partial(_run_ours, needs), plan=partial(_our_plan, needs)),
            "eager": Side(partial(_run_eager, needs), len(minimum) + 1),
            "liger-jsd": Side(partial(_run_liger, needs), note="one mean, no coefficient for each row"),
        },
        reference=partial(_reference, needs),
        products=lambda two: plain_products(two.head),
        minimum=("forward", *minimum),
        operations=(len(minimum) + 1) * shape.unit,
        shape={"R": shape.R, "H": shape.H, "V": shape.V, "dtype": str(shape.dtype)},
    )


def _inputs(shape: HeadShape, two: bool, device: torch.device) -> TwoHeads:
    """A reference that the policy has moved away from by a tenth."""
    head = peaked_head(shape, device)
    generator = torch.Generator(device).manual_seed(3)

    def moved(x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, device=device, generator=generator)
        return (x + 0.1 * x.float().std() * noise).to(x.dtype)

    return TwoHeads(head, moved(head.hidden_RH), moved(head.weight_VH) if two else None)


def _run_ours(needs: Sequence[str], two: TwoHeads) -> Run:
    from ttpa_kernels.linear_kl.op import linear_kl

    hidden_RH, weight_VH, wanted = leaves(two.head, needs)

    def run() -> Results:
        kl_R = linear_kl(hidden_RH, weight_VH, two.ref_hidden_RH, two.ref_weight_VH)
        return {"kl": kl_R.detach()} | gradient_names(needs, torch.autograd.grad(kl_R, wanted, two.head.grad_R))

    return run


def _our_plan(needs: Sequence[Need], two: TwoHeads) -> dict[str, float]:
    from ttpa_kernels.linear_kl.plan import plan

    shape = two.head.shape
    planned = plan(
        num_rows=shape.R,
        hidden_size=shape.H,
        vocab_size=shape.V,
        dtype=shape.dtype,
        device=two.head.hidden_RH.device,
        needs=needs,
        shared_head=two.ref_weight_VH is None,
    )
    return {"units": planned.units, "planned_bytes": planned.workspace_bytes}


def _run_eager(needs: Sequence[str], two: TwoHeads) -> Run:
    hidden_RH, weight_VH, wanted = leaves(two.head, needs)

    def run() -> Results:
        with torch.no_grad():
            ref_logp_RV = F.log_softmax((two.ref_hidden_RH @ two.reference_head.T).float(), dim=-1)
        logp_RV = F.log_softmax((hidden_RH @ weight_VH.T).float(), dim=-1)
        kl_R = F.kl_div(logp_RV, ref_logp_RV, reduction="none", log_target=True).sum(dim=-1)
        return {"kl": kl_R.detach()} | gradient_names(needs, torch.autograd.grad(kl_R, wanted, two.head.grad_R))

    return run


def _run_liger(needs: Sequence[str], two: TwoHeads) -> Run:
    """Liger's distillation loss at `jsd_beta=0`, which is KL(teacher || student)."""
    function = load("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(jsd_beta=0.0)
    peers.gpu_only(two.head, "Liger's distillation loss")
    hidden_RH, weight_VH, wanted = leaves(two.head, needs)

    def run() -> Results:
        mean = function(hidden_RH, weight_VH, two.ref_hidden_RH, two.reference_head, None)
        return {"mean": mean.detach()} | gradient_names(needs, torch.autograd.grad(mean, wanted), prefix="scalar-")

    return run


def _reference(needs: Sequence[str], two: TwoHeads, *, chunk: int = 256) -> Results:
    weight_VH = two.head.weight_VH.double().requires_grad_("weight" in needs)
    hidden_RH = two.head.hidden_RH.double().requires_grad_()
    ref_weight_VH = two.reference_head.double()
    wanted = [hidden_RH, weight_VH][: len(needs)]
    parts: list[torch.Tensor] = []
    totals = [torch.zeros_like(x) for x in wanted]
    for start in range(0, len(hidden_RH), chunk):
        rows = slice(start, start + chunk)
        ref_logp_CV = F.log_softmax(two.ref_hidden_RH[rows].double() @ ref_weight_VH.T, dim=-1)
        logp_CV = F.log_softmax(hidden_RH[rows] @ weight_VH.T, dim=-1)
        kl_C = (ref_logp_CV.exp() * (ref_logp_CV - logp_CV)).sum(dim=-1)
        parts.append(kl_C.detach())
        gradients = torch.autograd.grad(kl_C, wanted, two.head.grad_R[rows].double())
        totals = [total.add_(gradient) for total, gradient in zip(totals, gradients, strict=True)]
    return {"kl": torch.cat(parts)} | gradient_names(needs, totals)
