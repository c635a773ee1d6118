"""One chunk of head rows: its logits, their exponentials in place, and the products of the gradient.

C rows of a chunk, H hidden size, V vocabulary, A rank of a low-rank adapter of the head. Every operation on the head
is made of these parts; each takes the engine that computes the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ttpa_kernels.engine import Engine
from ttpa_kernels.numerics import operand, product, wide

STATS = ("lse", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")  # the rows of `stats_SC`
HALF_SCALE = 2.0**14  # largest magnitude of E in fp16


class Head(NamedTuple):
    """The head of a row: `x = logit_scale (W h + B u + bias)`, `z = softcap tanh(x / softcap) / temperature`."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    adapter_VA: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class Rows(NamedTuple):
    """Head rows: hidden states, target tokens, and the input u of the head's adapter where there is one."""

    hidden_CH: torch.Tensor
    target_C: torch.Tensor
    adapter_CA: torch.Tensor | None = None


class Exponentials(NamedTuple):
    """A chunk after its forward pass, with all that the gradient needs.

    The derivative of `logp_C` in the raw logits `W h + B u + bias` is `factor_C * E_CV`: E is `exp(z - shift)` with
    the sum subtracted at the target, times the slope of the softcap, and the factor carries the sum, the scale and
    the temperature. E stands in a dtype that `product` takes; the other fields are in the wide dtype.
    """

    E_CV: torch.Tensor
    factor_C: torch.Tensor
    logp_C: torch.Tensor
    stats_SC: torch.Tensor | None


def exponentials(
    head: Head, rows: Rows, *, engine: Engine, stats: bool = False, out: torch.Tensor | None = None
) -> Exponentials:
    """Log-probabilities of a chunk in nats and what its gradient needs; E is written to `out [C, V]` where given."""
    if engine == "triton":
        from ttpa_kernels.linear_logp import kernel

        return kernel.exponentials(head, rows, stats=stats, out=out)
    z_CV, slope_CV, target_C1 = *_logits(head, rows, slope=True), rows.target_C[:, None]
    stats_SC = _stats(z_CV, rows.target_C) if stats else None
    z_CV -= z_CV.amax(dim=1, keepdim=True)
    at_target_C = z_CV.gather(1, target_C1)[:, 0]
    E_CV = z_CV.exp_()
    total_C = E_CV.sum(dim=1)
    E_CV.scatter_add_(1, target_C1, -total_C[:, None])
    if slope_CV is not None:
        E_CV *= slope_CV
    factor_C = -head.logit_scale / head.temperature / total_C
    if rows.hidden_CH.is_cuda and rows.hidden_CH.dtype == torch.float16:
        E_CV *= HALF_SCALE / total_C[:, None]
        factor_C = torch.full_like(total_C, -head.logit_scale / head.temperature / HALF_SCALE)
    dtype = operand(rows.hidden_CH[:0]).dtype
    E_CV = E_CV.to(dtype) if out is None else out.copy_(E_CV)
    return Exponentials(E_CV, factor_C, at_target_C - total_C.log(), stats_SC)


def logps(head: Head, rows: Rows, *, engine: Engine, stats: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of a chunk, to the bit those of `exponentials`, and `stats_SC` where asked for."""
    if engine == "triton":
        from ttpa_kernels.linear_logp import kernel

        return kernel.logps(head, rows, stats=stats)
    z_CV = _logits(head, rows, slope=False)[0]
    stats_SC = _stats(z_CV, rows.target_C) if stats else None
    z_CV -= z_CV.amax(dim=1, keepdim=True)
    at_target_C = z_CV.gather(1, rows.target_C[:, None])[:, 0]
    return at_target_C - z_CV.exp_().sum(dim=1).log(), stats_SC


def _logits(head: Head, rows: Rows, *, slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`z_CV` in the wide dtype, and the derivative `1 - tanh^2` of a softcap where there is one and it is asked for."""
    z_CV = product(operand(rows.hidden_CH), operand(head.weight_VH).T)
    if head.adapter_VA is not None:
        assert rows.adapter_CA is not None
        z_CV += product(operand(rows.adapter_CA), operand(head.adapter_VA).T)
    if head.bias_V is not None:
        z_CV += head.bias_V
    if head.logit_scale != 1.0:
        z_CV *= head.logit_scale
    slope_CV = None
    if head.softcap is not None:
        z_CV = z_CV.div_(head.softcap).tanh_()
        slope_CV = 1 - z_CV * z_CV if slope else None
        z_CV *= head.softcap
    if head.temperature != 1.0:
        z_CV /= head.temperature
    return z_CV, slope_CV


def _stats(z_CV: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
    """The rows of STATS: `log sum e^z`, `-sum p log p`, `log sum p^2`, the mean logit, and 1 where the target is the
    first of the largest logits."""
    lse_C = z_CV.logsumexp(dim=1)
    logp_CV = z_CV - lse_C[:, None]
    p_CV = logp_CV.exp()
    entropy_C = -(p_CV * logp_CV).nan_to_num_(0.0).sum(dim=1)
    log_sum_sq_C = (2 * logp_CV).logsumexp(dim=1)
    is_top1_C = (z_CV.argmax(dim=1) == target_C).to(wide(z_CV.dtype))
    return torch.stack([lse_C, entropy_C, log_sum_sq_C, z_CV.mean(dim=1), is_top1_C])
