"""Log-probabilities of given tokens from hidden states and the head, forward and backward, against all peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F

from bench import peers
from bench.inputs import Head, HeadShape, peaked_head
from bench.measure import Case, Results, Run, Side
from bench.ops import Size
from bench.peers import Logp

Need = Literal["hidden", "weight"]
# What needs a gradient, and the products that nobody can do without.
MODES: dict[str, tuple[tuple[Need, ...], tuple[str, ...]]] = {
    "trainable": (("hidden", "weight"), ("forward", "dhidden", "dweight")),
    "frozen": (("hidden",), ("forward", "dhidden")),
    "no-grad": ((), ("forward",)),
}
COLUMN = {"trainable": 0, "frozen": 1, "no-grad": 2}  # in peers.PER_TOKEN
BF16, FP32 = torch.bfloat16, torch.float32
LLAMA, QWEN = HeadShape(8192, 4096, 128256, BF16), HeadShape(8192, 4096, 151936, BF16)
CASES: dict[Size, list[tuple[HeadShape, str]]] = {
    "toy": [(HeadShape(16, 32, 160, FP32), "trainable"), (HeadShape(16, 32, 160, FP32), "no-grad")],
    "cpu": [(HeadShape(2048, 512, 32000, FP32), mode) for mode in MODES],
    "gpu": [
        (LLAMA, "trainable"),
        (LLAMA, "frozen"),
        (QWEN, "trainable"),
        (QWEN, "frozen"),
        (LLAMA, "no-grad"),
        (QWEN, "no-grad"),
        (HeadShape(4096, 2048, 151936, BF16), "trainable"),
        (HeadShape(4096, 2304, 256000, BF16, softcap=30.0), "trainable"),
        (HeadShape(2048, 8192, 128256, BF16), "trainable"),
        (HeadShape(16384, 4096, 128256, BF16), "trainable"),
        (HeadShape(4096, 2048, 151936, BF16), "frozen"),
    ],
    "errors": [
        (HeadShape(512, 4096, 128256, BF16), "trainable"),
        (HeadShape(256, 1024, 32768, BF16), "trainable"),
        (HeadShape(256, 1024, 32768, FP32), "trainable"),
        (HeadShape(256, 1024, 32768, BF16, softcap=30.0), "trainable"),
    ],
}


def cases(size: Size) -> list[Case]:
    return [make_case(shape, mode) for shape, mode in CASES[size]]


def make_case(shape: HeadShape, mode: str) -> Case:
    """One shape with one choice of what needs a gradient."""
    needs, minimum = MODES[mode]
    sides = {
        "ttpa": Side(partial(_run, needs, ours), plan=partial(_our_plan, needs)),
        "ttpa-torch": Side(partial(_run, needs, partial(ours, engine="torch")), note="engine='torch'"),
    }
    for name, (make, units) in peers.PER_TOKEN.items():
        sides[name] = Side(partial(_run, needs, make), units[COLUMN[mode]])
    # The last one: it is the only one that autotunes.
    sides["quack"] = Side(partial(_run_scalar, needs), len(minimum), note="one scalar, no coefficient for each row")
    return Case(
        op="linear_logp",
        name=f"{shape}-{mode}",
        inputs=partial(peaked_head, shape),
        sides=sides,
        reference=partial(reference, needs),
        products=plain_products,
        minimum=minimum,
        operations=len(minimum) * shape.unit,
        shape={"R": shape.R, "H": shape.H, "V": shape.V, "dtype": str(shape.dtype), "softcap": shape.softcap},
    )


def ours(head: Head, *, engine: str | None = None) -> Logp:
    """`linear_logp` with its defaults, or with an engine asked for."""
    from ttpa_kernels.linear_logp.op import linear_logp

    return partial(linear_logp, softcap=head.shape.softcap, **ours_engine(head, engine))


def ours_engine(head: Head, engine: str | None) -> dict[str, Any]:
    """The option for an engine asked for: on a CPU there is but one."""
    if engine is None:
        return {}
    peers.gpu_only(head, "the comparison of our engines")
    return {"engine": engine}


def _our_plan(needs: Sequence[Need], head: Head) -> dict[str, float]:
    """What `linear_logp` says beforehand."""
    from ttpa_kernels.linear_logp.plan import plan

    R, H, V = head.shape.R, head.shape.H, head.shape.V
    device, dtype = head.hidden_RH.device, head.shape.dtype
    planned = plan(num_rows=R, hidden_size=H, vocab_size=V, dtype=dtype, device=device, needs=needs)
    return {"units": planned.units, "planned_bytes": planned.workspace_bytes}


def leaves(head: Head, needs: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Hidden states and head, with those of them that need a gradient once more as a list."""
    hidden_RH = head.hidden_RH.detach().requires_grad_("hidden" in needs)
    weight_VH = head.weight_VH.detach().requires_grad_("weight" in needs)
    return hidden_RH, weight_VH, [x for x in (hidden_RH, weight_VH) if x.requires_grad]


def _run(needs: Sequence[str], make: Callable[[Head], Logp], head: Head) -> Run:
    logp = make(head)
    hidden_RH, weight_VH, wanted = leaves(head, needs)

    def run() -> Results:
        logp_R = logp(hidden_RH, weight_VH, head.target_R)
        gradients = torch.autograd.grad(logp_R, wanted, head.grad_R.to(logp_R.dtype)) if wanted else ()
        return {"logp": logp_R.detach()} | gradient_names(needs, gradients)

    return run


def _run_scalar(needs: Sequence[str], head: Head) -> Run:
    """A side whose result is a sum cannot be compared row by row: only its time and memory are."""
    loss = peers.quack(head)
    hidden_RH, weight_VH, wanted = leaves(head, needs)

    def run() -> Results:
        with torch.set_grad_enabled(bool(wanted)):
            total = loss(hidden_RH, weight_VH, head.target_R)
        gradients = torch.autograd.grad(total, wanted) if wanted else ()
        return {"sum": total.detach()} | gradient_names(needs, gradients, prefix="scalar-")

    return run


def gradient_names(needs: Sequence[str], gradients: Sequence[torch.Tensor], prefix: str = "") -> Results:
    return {f"{prefix}d{name}": gradient for name, gradient in zip(needs, gradients, strict=True)}


def reference(needs: Sequence[str], head: Head, *, chunk: int = 256) -> Results:
    """Everything in fp64, some rows at a time."""
    weight_VH = head.weight_VH.double()
    logp_R = torch.empty_like(head.grad_R, dtype=torch.float64)
    dhidden_RH = torch.empty_like(head.hidden_RH, dtype=torch.float64)
    dweight_VH = torch.zeros_like(weight_VH) if "weight" in needs else None
    softcap = head.shape.softcap
    for start in range(0, len(logp_R), chunk):
        rows = slice(start, start + chunk)
        hidden_CH, target_C1, grad_C1 = (
            x[rows] for x in (head.hidden_RH, head.target_R[:, None], head.grad_R[:, None])
        )
        z_CV = hidden_CH.double() @ weight_VH.T
        slope_CV = None
        if softcap is not None:
            z_CV = torch.tanh(z_CV / softcap)
            slope_CV = 1 - z_CV * z_CV
            z_CV *= softcap
        logp_CV = F.log_softmax(z_CV, dim=1)
        logp_R[rows] = logp_CV.gather(1, target_C1)[:, 0]
        if not needs:
            continue
        dz_CV = logp_CV.exp_().neg_().scatter_add_(1, target_C1, torch.ones_like(grad_C1, dtype=torch.float64))
        dz_CV *= grad_C1
        if slope_CV is not None:
            dz_CV *= slope_CV
        dhidden_RH[rows] = dz_CV @ weight_VH
        if dweight_VH is not None:
            dweight_VH.addmm_(dz_CV.T, hidden_CH.double())
    return {"logp": logp_R, "dhidden": dhidden_RH} | ({"dweight": dweight_VH} if dweight_VH is not None else {})


def plain_products(head: Head) -> dict[str, Callable[[], object]]:
    """The three products of the head as plain calls of the matrix library, on probabilities as the backward pass has
    them: the rate of a GPU depends on the numbers it multiplies."""
    hidden_RH, weight_VH = head.hidden_RH, head.weight_VH
    logits_RV = hidden_RH @ weight_VH.T
    p_RV = torch.empty_like(logits_RV)
    for p_CV, logits_CV in zip(p_RV.split(1024), logits_RV.split(1024), strict=True):
        p_CV.copy_(logits_CV.float().softmax(dim=1))
    dhidden_RH, dweight_VH = torch.empty_like(hidden_RH), torch.empty_like(weight_VH)
    return {
        "forward": lambda: torch.mm(hidden_RH, weight_VH.T, out=logits_RV),
        "dhidden": lambda: torch.mm(p_RV, weight_VH, out=dhidden_RH),
        "dweight": lambda: torch.mm(p_RV.T, hidden_RH, out=dweight_VH),
    }
