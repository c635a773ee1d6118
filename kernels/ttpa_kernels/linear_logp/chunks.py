"""One chunk of head rows: its logits, their exponentials in place, and the products of the gradient.

C rows of a chunk, H hidden size, V vocabulary, A rank of a low-rank adapter of the head, X one of H and A. Every
operation on the head is made of these parts; each takes the engine that computes the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ttpa_kernels.engine import Engine
from ttpa_kernels.numerics import add_product_, operand, product, wide

STATS = ("lse", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")  # the rows of `stats_SC`
HALF_SCALE = 2.0**14  # largest magnitude of E in fp16
VANISHED = -1e4  # `x exp(x)` is 0 from here on down
PART_BYTES = 4 << 20  # logits that pass through the elementwise steps together: on a CPU, what its caches hold
GPU_PART_BYTES = 64 << 20
COPY_BYTES = 16 << 20  # a block of a half-precision head, converted


class Head(NamedTuple):
    """The head of a row: `x = logit_scale (W h + B u + bias)`, `z = softcap tanh(x / softcap) / temperature`."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    adapter_VA: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def columns(self, block: slice) -> Head:
        """The head of a block of the vocabulary, its matrices as factors of products."""
        bias_V = None if self.bias_V is None else self.bias_V[block]
        adapter_VA = None if self.adapter_VA is None else operand(self.adapter_VA[block])
        return self._replace(weight_VH=operand(self.weight_VH[block]), bias_V=bias_V, adapter_VA=adapter_VA)


class Rows(NamedTuple):
    """Head rows: hidden states, target tokens, and the input u of the head's adapter where there is one."""

    hidden_CH: torch.Tensor
    target_C: torch.Tensor
    adapter_CA: torch.Tensor | None = None

    def chunk(self, rows: slice) -> Rows:
        adapter_CA = None if self.adapter_CA is None else self.adapter_CA[rows]
        return Rows(self.hidden_CH[rows], self.target_C[rows], adapter_CA)


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


class Upstream(NamedTuple):
    """Gradients of a loss in the results of C rows, in the wide dtype; None where there is none."""

    logp_C: torch.Tensor | None
    lse_C: torch.Tensor | None
    entropy_C: torch.Tensor | None

    def rows(self, rows: slice) -> Upstream:
        return Upstream(*(None if g is None else g[rows] for g in self))


def exponentials(
    head: Head, rows: Rows, *, engine: Engine, stats: bool = False, out: torch.Tensor | None = None
) -> Exponentials:
    """Log-probabilities of a chunk in nats and what its gradient needs; E is written to `out [C, V]` where given."""
    if engine == "triton":
        from ttpa_kernels.linear_logp import kernel

        return kernel.exponentials(head, rows, stats=stats, out=out)
    dtype = operand(rows.hidden_CH[:0]).dtype
    z_CV = _raw_logits(head, rows, out=out if dtype == wide(dtype) else None)
    E_CV = z_CV
    if dtype != z_CV.dtype:
        E_CV = torch.empty_like(z_CV, dtype=dtype) if out is None else out
    folded = _fold_(head, z_CV, rows.target_C, stats=stats, E_CV=E_CV)
    return Exponentials(E_CV, folded.factor_C, folded.logp_C, folded.stats_SC)


def logps(
    head: Head, rows: Rows, *, engine: Engine, stats: bool = False, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities of a chunk, to the bit those of `exponentials`, and `stats_SC` where asked for.

    The engine 'torch' computes the logits in `out [C, V]`, of the wide dtype, where given.
    """
    if engine == "triton":
        from ttpa_kernels.linear_logp import kernel

        return kernel.logps(head, rows, stats=stats)
    folded = _fold_(head, _raw_logits(head, rows, out=out), rows.target_C, stats=stats)
    return folded.logp_C, folded.stats_SC


def logps_and_lse(
    head: Head, rows: Rows, *, engine: Engine, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logps`, and the log-sum-exp of each row."""
    if engine == "triton":
        logp_C, stats_SC = logps(head, rows, engine=engine, stats=True)
        assert stats_SC is not None
        return logp_C, stats_SC[0]
    folded = _fold_(head, _raw_logits(head, rows, out=out), rows.target_C, stats=False)
    return folded.logp_C, folded.lse_C


def logit_gradients(
    head: Head,
    rows: Rows,
    upstream: Upstream,
    *,
    lse_C: torch.Tensor | None = None,
    entropy_C: torch.Tensor | None = None,
    start: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of a loss in the raw logits `W h + B u + bias`, which are computed again, as a factor of products.

    With `p = exp(z - lse)` and the upstream gradients g of log-probability, log-sum-exp and entropy it is
    `g_logp (onehot - p) + g_lse p - g_entropy p (z - lse + entropy)`, times slope and scale. The head is whole, or it
    is `Head.columns` of the block of the vocabulary that begins at `start`, and the sums over all logits are given.
    """
    z_CV = _raw_logits(head, rows, out=out)
    scale = head.logit_scale / head.temperature
    for part in _parts(z_CV):
        z_PV, target_P1 = z_CV[part], rows.target_C[part, None] - start
        slope_PV = _activate_(z_PV, head, slope=True)
        if lse_C is None:  # from the logits themselves, whose rounding it then shares
            z_PV -= z_PV.amax(dim=1, keepdim=True)
            z_PV -= z_PV.exp().sum(dim=1, keepdim=True).log_()
        else:
            z_PV -= lse_C[part, None]
        logp_P1, lse_P1, entropy_P1 = (None if g is None else scale * g[part, None] for g in upstream)
        p_factor_P1 = torch.zeros_like(z_PV[:, :1])
        if logp_P1 is not None:
            p_factor_P1 -= logp_P1
        if lse_P1 is not None:
            p_factor_P1 += lse_P1
        if entropy_P1 is None:
            z_PV.exp_().mul_(p_factor_P1)
        else:
            p_PV = z_PV.exp()
            z_PV.clamp_(min=VANISHED)
            value_P1 = -(p_PV * z_PV).sum(dim=1, keepdim=True) if entropy_C is None else entropy_C[part, None]
            z_PV.add_(value_P1).mul_(-entropy_P1).add_(p_factor_P1).mul_(p_PV)
        if logp_P1 is not None:
            inside_P1 = (target_P1 >= 0) & (target_P1 < z_PV.shape[1])
            z_PV.scatter_add_(1, target_P1.clamp(0, z_PV.shape[1] - 1), torch.where(inside_P1, logp_P1, 0.0))
        if slope_PV is not None:
            z_PV *= slope_PV
    return z_CV.to(operand(rows.hidden_CH[:0]).dtype)


def product_with_head(E_CV: torch.Tensor, matrix_VX: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """`E @ M` in the wide dtype for M one of the head's matrices, converted a block at a time where it must be."""
    if matrix_VX.dtype == E_CV.dtype:
        return product(E_CV, matrix_VX, out=out)
    total_CX = E_CV.new_zeros(len(E_CV), matrix_VX.shape[1]) if out is None else out.zero_()
    for block, copy_BX in _converted(matrix_VX, E_CV.dtype):
        add_product_(total_CX, E_CV[:, block], copy_BX)
    return total_CX


class _Folded(NamedTuple):
    logp_C: torch.Tensor
    lse_C: torch.Tensor
    factor_C: torch.Tensor
    stats_SC: torch.Tensor | None


def _fold_(
    head: Head, z_CV: torch.Tensor, target_C: torch.Tensor, *, stats: bool, E_CV: torch.Tensor | None = None
) -> _Folded:
    """Fold raw logits into results, in place; `E_CV` (may be the logits themselves) receives E where given.

    The sum at the target is that of the other exponentials, so that it is exact where the target is confident.
    """
    logp_C, lse_C, factor_C = z_CV.new_empty(3, len(z_CV))
    stats_SC = z_CV.new_empty(len(STATS), len(z_CV)) if stats else None
    scale = -head.logit_scale / head.temperature
    for part in _parts(z_CV):
        z_PV, target_P1 = z_CV[part], target_C[part, None]
        slope_PV = _activate_(z_PV, head, slope=E_CV is not None)
        if stats_SC is not None:
            stats_SC[3, part] = z_PV.mean(dim=1)
            stats_SC[4, part] = (z_PV.argmax(dim=1) == target_C[part]).to(z_PV.dtype)
        peak_P1 = z_PV.amax(dim=1, keepdim=True)
        z_PV -= peak_P1
        at_target_P1 = z_PV.gather(1, target_P1)
        shifted_PV = z_PV.clamp(min=VANISHED) if stats else None
        z_PV.exp_()
        if stats_SC is not None and shifted_PV is not None:
            first_P, second_P = shifted_PV.mul_(z_PV).sum(dim=1), (z_PV * z_PV).sum(dim=1)
        target_e_P1 = z_PV.gather(1, target_P1)
        z_PV.scatter_(1, target_P1, 0.0)
        others_P1 = z_PV.sum(dim=1, keepdim=True)
        total_P1 = others_P1 + target_e_P1
        log_total_P1 = total_P1.log()
        logp_C[part] = (at_target_P1 - log_total_P1)[:, 0]
        lse_C[part] = (peak_P1 + log_total_P1)[:, 0]
        if stats_SC is not None:
            stats_SC[0, part] = lse_C[part]
            stats_SC[1, part] = log_total_P1[:, 0] - first_P / total_P1[:, 0]
            stats_SC[2, part] = second_P.log() - 2 * log_total_P1[:, 0]
        if E_CV is None:
            continue
        z_PV.scatter_(1, target_P1, -others_P1)
        if slope_PV is not None:
            z_PV *= slope_PV
        factor_C[part] = scale / total_P1[:, 0]
        if E_CV.dtype == torch.float16:
            z_PV *= HALF_SCALE / total_P1
            factor_C[part] = scale / HALF_SCALE
        if E_CV is not z_CV:
            E_CV[part] = z_PV
    return _Folded(logp_C, lse_C, factor_C, stats_SC)


def _raw_logits(head: Head, rows: Rows, *, out: torch.Tensor | None) -> torch.Tensor:
    """`W h + B u` in the wide dtype; bias, scale, softcap and temperature are `_activate_`'s."""
    hidden_CH = operand(rows.hidden_CH)
    if head.weight_VH.dtype == hidden_CH.dtype:
        z_CV = product(hidden_CH, head.weight_VH.T, out=out)
    else:
        z_CV = hidden_CH.new_empty(len(hidden_CH), len(head.weight_VH)) if out is None else out
        for block, copy_BH in _converted(head.weight_VH, hidden_CH.dtype):
            product(hidden_CH, copy_BH.T, out=z_CV[:, block])
    if head.adapter_VA is not None:
        assert rows.adapter_CA is not None
        add_product_(z_CV, operand(rows.adapter_CA), operand(head.adapter_VA).T)
    return z_CV


def _activate_(z_PV: torch.Tensor, head: Head, *, slope: bool) -> torch.Tensor | None:
    """Raw logits to logits, in place; returns the derivative `1 - tanh^2` of a softcap where asked for."""
    if head.bias_V is not None:
        z_PV += head.bias_V
    if head.softcap is None:
        if head.logit_scale != 1.0:
            z_PV *= head.logit_scale
        if head.temperature != 1.0:
            z_PV /= head.temperature
        return None
    z_PV.mul_(head.logit_scale / head.softcap).tanh_()
    slope_PV = (z_PV * z_PV).neg_().add_(1) if slope else None
    z_PV *= head.softcap / head.temperature
    return slope_PV


def _parts(z_CV: torch.Tensor) -> Iterator[slice]:
    """Rows that pass through the elementwise steps together."""
    rows = max(1, (GPU_PART_BYTES if z_CV.is_cuda else PART_BYTES) // (z_CV.shape[1] * z_CV.element_size()))
    for start in range(0, len(z_CV), rows):
        yield slice(start, min(start + rows, len(z_CV)))


def _converted(matrix_VX: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """A matrix in another dtype, block by block, each in the memory of the one before."""
    V, X = matrix_VX.shape
    rows = max(1, COPY_BYTES // (X * dtype.itemsize))
    copy_BX = matrix_VX.new_empty(min(rows, V), X, dtype=dtype)
    for start in range(0, V, rows):
        block = slice(start, min(start + rows, V))
        yield block, copy_BX[: block.stop - start].copy_(matrix_VX[block])
