"""The preference loss from hidden states and the head, forward and backward, against all peers.

A peer with log-probabilities per token gets the loss in plain PyTorch on top; Liger's preference loss has its own.
The reference log-probabilities that are given are 0: Liger takes none, and reckons with 0 then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench import peers
from bench.inputs import Head, HeadShape, Pairs, make_pairs, peaked_head
from bench.measure import Case, Results, Run, Side
from bench.ops import Size
from bench.ops.linear_logp import BF16, COLUMN, FP32, MODES, Need, gradient_names, leaves, plain_products
from bench.ops.linear_logp import reference as logp_reference
from bench.peers import IGNORED, Logp, load

BETA = 0.1
SKIPS_ROWS = ("cce", "cce-exact")  # and TRL on a GPU


@dataclass(frozen=True)
class Preference:
    """A head with pairs over its rows, and the reference's hidden states where it is not given."""

    head: Head
    pairs: Pairs
    ref_hidden_RH: torch.Tensor | None

    @property
    def target_R(self) -> torch.Tensor:
        """Targets for peers: IGNORED where no pair has a coefficient."""
        return self.head.target_R.masked_fill(~self.pairs.counts_R, IGNORED)


# Shape, pairs, share of rows with a coefficient, mode, and whether the reference is computed as well.
CASES: dict[Size, list[tuple[HeadShape, int, float, str, bool]]] = {
    "toy": [(HeadShape(32, 32, 160, FP32), 2, 0.5, "trainable", False)],
    "cpu": [
        (HeadShape(2048, 512, 32000, FP32), 4, 0.4, "trainable", False),
        (HeadShape(2048, 512, 32000, FP32), 4, 0.4, "frozen", False),
    ],
    "gpu": [
        (HeadShape(8192, 4096, 128256, BF16), 8, 1.0, "trainable", False),
        (HeadShape(8192, 4096, 151936, BF16), 8, 0.4, "trainable", False),
        (HeadShape(8192, 4096, 128256, BF16), 8, 1.0, "frozen", True),
        (HeadShape(8192, 4096, 128256, BF16), 1, 1.0, "trainable", False),
    ],
    "errors": [(HeadShape(512, 4096, 128256, BF16), 4, 0.5, "trainable", False)],
}


def cases(size: Size) -> list[Case]:
    return [make_case(*case) for case in CASES[size]]


def make_case(shape: HeadShape, num_pairs: int, share: float, mode: str, online: bool) -> Case:
    """`online`: the reference shares the head, and its log-probabilities are computed in the same step."""
    needs, minimum = MODES[mode]
    online_units = 1 if online else 0
    sides = {"ttpa": Side(partial(_run_ours, needs), plan=partial(_our_plan, needs))}
    sides["liger-dpo"] = Side(partial(_run_liger, needs), len(minimum) + online_units, note="compiled on a GPU only")
    for name, (make, units) in peers.PER_TOKEN.items():
        computed = share if name in SKIPS_ROWS or (name == "trl" and shape.dtype == BF16) else 1.0
        sides[name] = Side(partial(_run, needs, make), (units[COLUMN[mode]] + online_units) * computed)
    pairs = f"P{num_pairs}-{share:.0%}-rows-{'online' if online else 'given'}"
    return Case(
        op="linear_token_dpo",
        name=f"{shape}-{pairs}-{mode}",
        inputs=partial(_inputs, shape, num_pairs, share, online),
        sides=sides,
        reference=partial(_reference, needs),
        products=lambda preference: plain_products(preference.head),
        minimum=("forward",) * online_units + tuple(minimum),
        share=share,
        operations=(len(minimum) + online_units) * share * shape.unit,
        shape={"R": shape.R, "H": shape.H, "V": shape.V, "P": num_pairs, "dtype": str(shape.dtype), "share": share},
    )


def _inputs(shape: HeadShape, num_pairs: int, share: float, online: bool, device: torch.device) -> Preference:
    head = peaked_head(shape, device)
    noise_RH = torch.randn(shape.R, shape.H, device=device, generator=torch.Generator(device).manual_seed(2))
    ref_hidden_RH = (head.hidden_RH + 0.1 * noise_RH).to(shape.dtype) if online else None
    return Preference(head, make_pairs(shape.R, num_pairs, share=share, device=device), ref_hidden_RH)


def preference_loss(logp_R: torch.Tensor, ref_logp_R: torch.Tensor | float, pairs: Pairs) -> torch.Tensor:
    """`-log sigmoid(beta sum C (logp - reference))`, the mean over the pairs."""
    difference_R = pairs.sign_R * (logp_R - ref_logp_R)
    margin_P = difference_R.new_zeros(pairs.num_pairs).index_add(0, pairs.pair_R, difference_R)
    return -F.logsigmoid(BETA * margin_P).mean()


def _run(needs: Sequence[str], make: Callable[[Head], Logp], preference: Preference) -> Run:
    logp = make(preference.head)
    hidden_RH, weight_VH, wanted = leaves(preference.head, needs)
    target_R, ref_hidden_RH = preference.target_R, preference.ref_hidden_RH

    def run() -> Results:
        ref_logp_R: torch.Tensor | float = 0.0
        if ref_hidden_RH is not None:
            with torch.no_grad():
                ref_logp_R = logp(ref_hidden_RH, weight_VH, target_R)
        loss = preference_loss(logp(hidden_RH, weight_VH, target_R), ref_logp_R, preference.pairs)
        gradients = torch.autograd.grad(loss, wanted)
        return {"loss": loss.detach()} | gradient_names(needs, gradients)

    return run


def _run_ours(needs: Sequence[str], preference: Preference) -> Run:
    from ttpa_kernels.linear_token_dpo.op import linear_token_dpo

    head, ref_hidden_RH = preference.head, preference.ref_hidden_RH
    hidden_RH, weight_VH, wanted = leaves(head, needs)
    pairs = our_pairs(preference.pairs)
    given = torch.zeros_like(head.grad_R)
    reference: dict[str, Any] = {"ref_logp_R": given} if ref_hidden_RH is None else {"ref_hidden_RH": ref_hidden_RH}

    def run() -> Results:
        loss = linear_token_dpo(
            hidden_RH=hidden_RH, weight_VH=weight_VH, target_R=head.target_R, pairs=pairs, beta=BETA, **reference
        )[0]
        gradients = torch.autograd.grad(loss, wanted)
        return {"loss": loss.detach()} | gradient_names(needs, gradients)

    return run


def _our_plan(needs: Sequence[Need], preference: Preference) -> dict[str, float]:
    from ttpa_kernels.linear_token_dpo.plan import plan

    shape, online = preference.head.shape, preference.ref_hidden_RH is not None
    device, pairs = preference.head.hidden_RH.device, our_pairs(preference.pairs)
    planned = plan(
        pairs=pairs,
        hidden_size=shape.H,
        vocab_size=shape.V,
        dtype=shape.dtype,
        device=device,
        needs=needs,
        online=online,
    )
    return {"units": planned.units * planned.rows / shape.R, "planned_bytes": planned.workspace_bytes}


def our_pairs(pairs: Pairs) -> Any:
    """The coefficients as our operations take them."""
    from ttpa_kernels.token_dpo.pairs import PairMatrix

    return PairMatrix.from_sparse(pairs.matrix())


def _run_liger(needs: Sequence[str], preference: Preference) -> Run:
    """One pair a chunk, which is its default. It takes the sides padded, all chosen ones before all rejected ones, and
    gets them so; every row is multiplied."""
    head, pairs = preference.head, preference.pairs
    module = load("liger_kernel.chunked_loss")
    peers.no_softcap(head, "Liger's preference loss")
    ref_hidden_RH = preference.ref_hidden_RH
    loss_function = module.LigerFusedLinearDPOLoss(
        beta=BETA,
        use_ref_model=ref_hidden_RH is not None,
        compiled=head.hidden_RH.is_cuda,  # on a CPU compiling takes longer than all runs
    )

    def stacked(x: torch.Tensor) -> torch.Tensor:
        return x.view(pairs.num_pairs, 2, -1, *x.shape[1:]).transpose(0, 1).flatten(0, 1)

    _, weight_VH, wanted = leaves(head, needs)
    hidden_SLH = stacked(head.hidden_RH).requires_grad_()
    wanted = [hidden_SLH, *wanted[1:]]
    target_SL = stacked(preference.target_R)
    reference: dict[str, torch.Tensor] = {}
    if ref_hidden_RH is not None:
        reference = {"ref_input": stacked(ref_hidden_RH), "ref_weight": head.weight_VH}

    def run() -> Results:
        loss = loss_function(weight_VH, hidden_SLH, target_SL, **reference)[0]
        results = {"loss": loss.detach()} | gradient_names(needs, torch.autograd.grad(loss, wanted))
        # A view in the order of all others.
        results["dhidden"] = results["dhidden"].unflatten(0, (2, pairs.num_pairs)).transpose(0, 1)
        return results

    return run


def _reference(needs: Sequence[str], preference: Preference) -> Results:
    head = preference.head
    ref_logp_R: torch.Tensor | float = 0.0
    if preference.ref_hidden_RH is not None:
        ref_logp_R = logp_reference((), dataclasses.replace(head, hidden_RH=preference.ref_hidden_RH))["logp"]
    logp_R = logp_reference((), head)["logp"].requires_grad_()
    loss = preference_loss(logp_R, ref_logp_R, preference.pairs)
    (grad_R,) = torch.autograd.grad(loss, logp_R)
    results = logp_reference(needs, dataclasses.replace(head, grad_R=grad_R))
    return {"loss": loss.detach()} | {name: results[name] for name in results if name != "logp"}
