"""What a sampler needs of the next token: entropy, its spread, the largest logits, and a draw."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.inputs import Head, HeadShape, peaked_head
from bench.measure import Case, Results, Run, Side
from bench.ops import Size
from bench.ops.linear_logp import BF16, FP32, ours_engine

NUM_TOP = 20
SHAPES: dict[Size, list[HeadShape]] = {
    "toy": [HeadShape(4, 32, 160, FP32)],
    "cpu": [HeadShape(64, 512, 32000, FP32)],
    "gpu": [HeadShape(256, 1536, 151936, BF16), HeadShape(32, 4096, 128256, BF16), HeadShape(256, 4096, 128256, BF16)],
    "errors": [HeadShape(256, 1536, 151936, BF16)],
}


def cases(size: Size) -> list[Case]:
    return [make_case(shape) for shape in SHAPES[size]]


def make_case(shape: HeadShape) -> Case:
    return Case(
        op="next_token",
        name=f"{shape}-top{NUM_TOP}",
        inputs=partial(peaked_head, shape),
        sides={
            "ttpa": Side(_run_ours, 1),
            "ttpa-torch": Side(partial(_run_ours, engine="torch"), 1, note="engine='torch'"),
            "eager": Side(_run_eager, 1),
        },
        reference=_reference,
        products=_plain_product,
        minimum=("forward",),
        operations=shape.unit,
        shape={"B": shape.R, "H": shape.H, "V": shape.V, "K": NUM_TOP, "dtype": str(shape.dtype)},
    )


def _run_ours(head: Head, *, engine: str | None = None) -> Run:
    from ttpa_kernels.next_token.op import next_token

    options = ours_engine(head, engine)
    key_B = torch.arange(head.shape.R, device=head.hidden_RH.device)

    def run() -> Results:
        with torch.no_grad():
            token = next_token(head.hidden_RH, head.weight_VH, num_top=NUM_TOP, key_B=key_B, **options)
        assert token.draw_B is not None  # there are keys
        return {
            "lse": token.lse_B,
            "entropy": token.entropy_B,
            "varentropy": token.varentropy_B,
            "top_logit": token.top_logit_BK,
            "draw": token.draw_B,
        }

    return run


def _run_eager(head: Head) -> Run:
    """All logits in fp32; the draw is the largest logit with Gumbel noise, as it needs no answer from the GPU."""

    def run() -> Results:
        with torch.no_grad():
            z_BV = (head.hidden_RH @ head.weight_VH.T).float()
            noise_BV = torch.empty_like(z_BV).exponential_().log_()
            return _statistics(z_BV) | {"draw": (z_BV - noise_BV).argmax(dim=-1)}

    return run


def _statistics(z_BV: torch.Tensor) -> Results:
    lse_B = z_BV.logsumexp(dim=-1)
    logp_BV = z_BV - lse_B[:, None]
    p_BV = logp_BV.exp()
    entropy_B = -(p_BV * logp_BV).sum(dim=-1)
    varentropy_B = (p_BV * (logp_BV + entropy_B[:, None]).square()).sum(dim=-1)
    top_logit_BK = z_BV.topk(NUM_TOP, dim=-1).values
    return {"lse": lse_B, "entropy": entropy_B, "varentropy": varentropy_B, "top_logit": top_logit_BK}


def _reference(head: Head) -> Results:
    return _statistics(head.hidden_RH.double() @ head.weight_VH.double().T)


def _plain_product(head: Head) -> dict[str, Callable[[], object]]:
    z_BV = head.hidden_RH @ head.weight_VH.T
    return {"forward": lambda: torch.mm(head.hidden_RH, head.weight_VH.T, out=z_BV)}
