"""The preference loss from log-probabilities, forward and backward: one small kernel against a dozen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from bench.inputs import Pairs, make_pairs
from bench.measure import Case, Results, Run, Side
from bench.ops import Size
from bench.ops.linear_token_dpo import BETA, our_pairs, preference_loss

SHAPES: dict[Size, list[tuple[int, int]]] = {  # rows and pairs
    "toy": [(32, 2)],
    "cpu": [(8192, 64)],
    "gpu": [(8192, 64), (65536, 512)],
    "errors": [(8192, 64)],
}


@dataclass(frozen=True)
class Losses:
    logp_R: torch.Tensor
    ref_logp_R: torch.Tensor
    pairs: Pairs


def cases(size: Size) -> list[Case]:
    return [make_case(R, P) for R, P in SHAPES[size]]


def make_case(R: int, P: int) -> Case:
    sides = {"ttpa": _run_ours, "eager": _run_eager, "eager-sparse": _run_sparse, "eager-padded": _run_padded}
    return Case(
        op="token_dpo",
        name=f"R{R}-P{P}",
        inputs=partial(_inputs, R, P),
        sides={name: Side(build) for name, build in sides.items()},
        reference=_reference,
        shape={"R": R, "P": P},
    )


def _inputs(R: int, P: int, device: torch.device) -> Losses:
    generator = torch.Generator(device).manual_seed(0)
    logp_R, ref_logp_R = -2 * torch.rand(2, R, device=device, generator=generator)
    return Losses(logp_R, ref_logp_R, make_pairs(R, P, share=0.4, device=device))


def _results(loss: torch.Tensor, logp_R: torch.Tensor) -> Results:
    return {"loss": loss.detach(), "dlogp": torch.autograd.grad(loss, logp_R)[0]}


def _run_ours(losses: Losses) -> Run:
    from ttpa_kernels.token_dpo.op import token_dpo

    pairs, logp_R = our_pairs(losses.pairs), losses.logp_R.detach().requires_grad_()

    def run() -> Results:
        loss = token_dpo(logp_R=logp_R, ref_logp_R=losses.ref_logp_R, pairs=pairs, beta=BETA)[0]
        return _results(loss, logp_R)

    return run


def _run_eager(losses: Losses) -> Run:
    logp_R = losses.logp_R.detach().requires_grad_()
    return lambda: _results(preference_loss(logp_R, losses.ref_logp_R, losses.pairs), logp_R)


def _run_sparse(losses: Losses) -> Run:
    C, logp_R = losses.pairs.matrix(), losses.logp_R.detach().requires_grad_()

    def run() -> Results:
        margin_P = torch.mv(C, logp_R - losses.ref_logp_R)
        return _results(-F.logsigmoid(BETA * margin_P).mean(), logp_R)

    return run


def _run_padded(losses: Losses) -> Run:
    """As trainers of whole completions reckon: one padded row a side."""
    logp_R, P = losses.logp_R.detach().requires_grad_(), losses.pairs.num_pairs
    counts_P2L = losses.pairs.counts_R.view(P, 2, -1)

    def run() -> Results:
        difference_P2L = (logp_R - losses.ref_logp_R).view(P, 2, -1)
        chosen_P, rejected_P = (difference_P2L * counts_P2L).sum(dim=2).unbind(dim=1)
        return _results(-F.logsigmoid(BETA * (chosen_P - rejected_P)).mean(), logp_R)

    return run


def _reference(losses: Losses) -> Results:
    logp_R = losses.logp_R.double().requires_grad_()
    return _results(preference_loss(logp_R, losses.ref_logp_R.double(), losses.pairs), logp_R)
