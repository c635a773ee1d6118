"""One chunk of head rows: divergences of its distributions, and the matrix that their gradient is made of.

C rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ttpa_kernels.engine import Engine
from ttpa_kernels.numerics import operand, product, wide

HALF_SCALE = 2.0**14  # D lies in [-1, 1], and fp16 has most digits for it in this range
PART_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}  # logits that pass through the elementwise steps together
NEAR = 1.0  # the largest |log p / p_ref| whose exponential is computed as a distance from 1


class Heads(NamedTuple):
    """The heads of policy and reference: `x = logit_scale (W h + bias)`, `z = softcap tanh(x / softcap) / temperature`.

    Without `ref_weight_VH` the reference shares weight and bias of the policy, and `ref_bias_V` is that bias.
    """

    weight_VH: torch.Tensor
    ref_weight_VH: torch.Tensor | None = None
    bias_V: torch.Tensor | None = None
    ref_bias_V: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def operands(self) -> Heads:
        """The same with weights that `product` takes."""
        ref_weight_VH = None if self.ref_weight_VH is None else operand(self.ref_weight_VH)
        return self._replace(weight_VH=operand(self.weight_VH), ref_weight_VH=ref_weight_VH)


def gradient_scale(dtype: torch.dtype) -> float:
    """What D is multiplied by where it is stored in this dtype."""
    return HALF_SCALE if dtype == torch.float16 else 1.0


def divergences(
    heads: Heads,
    hidden_CH: torch.Tensor,
    ref_hidden_CH: torch.Tensor,
    *,
    engine: Engine,
    gradient: bool,
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """`kl_C` in nats of a chunk, in the wide dtype. Hidden states and weights are operands of products. With `gradient`
    the first of the two `buffers [C, V]`, in the dtype of the hidden states, becomes D: `gradient_scale` times
    `p - p_ref` times the slope of the softcap. The buffers are otherwise overwritten; without a gradient they are
    optional."""
    if engine == "triton":
        from ttpa_kernels.linear_kl import kernel

        scale = gradient_scale(hidden_CH.dtype)
        return kernel.divergences(heads, hidden_CH, ref_hidden_CH, out=buffers if gradient else None, scale=scale)
    dtype = wide(hidden_CH.dtype)
    in_place = buffers is not None and buffers[0].dtype == dtype
    out_CV, ref_out_CV = buffers if buffers is not None and in_place else (None, None)
    ref_weight_VH = heads.weight_VH if heads.ref_weight_VH is None else heads.ref_weight_VH
    z_CV = product(hidden_CH, heads.weight_VH.T, out=out_CV)
    ref_z_CV = product(ref_hidden_CH, ref_weight_VH.T, out=ref_out_CV)
    kl_C = z_CV.new_empty(len(z_CV))
    step = max(1, PART_BYTES["cpu" if z_CV.device.type == "cpu" else "cuda"] // (z_CV.shape[1] * dtype.itemsize))
    for start in range(0, len(z_CV), step):
        rows = slice(start, start + step)
        kl_C[rows], D_PV = _divergences_(heads, z_CV[rows], ref_z_CV[rows], gradient=gradient)
        if D_PV is not None:
            assert buffers is not None
            torch.mul(D_PV, gradient_scale(hidden_CH.dtype), out=buffers[0][rows])
    return kl_C


def _divergences_(
    heads: Heads, z_PV: torch.Tensor, ref_z_PV: torch.Tensor, *, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Divergences and D of a few rows from their raw logits, which are overwritten.

    `KL = sum p_ref (r - 1 - log r)` with `r = p / p_ref`: every term is at least 0 and of second order in `log r`, so
    nothing cancels where the distributions are close, and an error of the log-sum-exps counts with its square.
    """
    slope_PV = _activate_(z_PV, heads.bias_V, heads, slope=gradient)
    _activate_(ref_z_PV, heads.ref_bias_V, heads, slope=False)
    top_P1, ref_top_P1 = z_PV.amax(dim=1, keepdim=True), ref_z_PV.amax(dim=1, keepdim=True)
    d_PV = z_PV - ref_z_PV
    z_PV -= top_P1
    ref_z_PV -= ref_top_P1
    lowered_d_PV = z_PV - ref_z_PV
    p_PV, ref_p_PV = z_PV.exp_(), ref_z_PV.exp_()
    total_P1, ref_total_P1 = p_PV.sum(dim=1, keepdim=True), ref_p_PV.sum(dim=1, keepdim=True)
    # The log-ratio from logits where the two sums are close, else from logits less their maxima: each has small terms.
    log_ratio_P1 = total_P1.log() - ref_total_P1.log()
    shift_P1 = (top_P1 - ref_top_P1) + log_ratio_P1
    close_P1 = shift_P1.abs() < 1
    d_PV = torch.where(close_P1, d_PV, lowered_d_PV)
    d_PV -= torch.where(close_P1, shift_P1, log_ratio_P1)
    p_PV /= total_P1
    ref_p_PV /= ref_total_P1
    near_PV = torch.expm1(d_PV).mul_(ref_p_PV)
    D_PV = torch.where(d_PV.abs() < NEAR, near_PV, p_PV - ref_p_PV)
    # Where p_ref is 0 so is p_ref log r, however far away the policy is.
    terms_PV = torch.where(ref_p_PV == 0, p_PV, torch.addcmul(D_PV, ref_p_PV, d_PV, value=-1))
    kl_P = terms_PV.sum(dim=1).clamp_(min=0)
    if not gradient:
        return kl_P, None
    return kl_P, D_PV if slope_PV is None else D_PV.mul_(slope_PV)


def _activate_(z_PV: torch.Tensor, bias_V: torch.Tensor | None, heads: Heads, *, slope: bool) -> torch.Tensor | None:
    """Raw logits to logits, in place; returns the derivative `1 - tanh^2` of a softcap where asked for."""
    if bias_V is not None:
        z_PV += bias_V
    if heads.softcap is None:
        if heads.logit_scale / heads.temperature != 1.0:
            z_PV *= heads.logit_scale / heads.temperature
        return None
    z_PV.mul_(heads.logit_scale / heads.softcap).tanh_()
    slope_PV = (z_PV * z_PV).neg_().add_(1) if slope else None
    z_PV *= heads.softcap / heads.temperature
    return slope_PV
