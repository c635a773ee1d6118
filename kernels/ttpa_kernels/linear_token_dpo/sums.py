"""The gradients of a head's matrices, summed over blocks of rows.

V vocabulary, H hidden size, A rank of the adapter, X one of H, A and 1, B rows of a block.
"""

from __future__ import annotations

import torch

from ttpa_kernels.linear_logp.chunks import COPY_BYTES, GPU_PART_BYTES, Head, Rows
from ttpa_kernels.linear_logp.passes import Gradients
from ttpa_kernels.numerics import add_product_, operand, product, wide

FP16_ROOM = 2.0**11  # the largest factor of a row in fp16, so that small ones keep their digits


class HeadSums:
    """Sums `E^T (factor weight X)` over blocks, X the rows' hidden states, adapter inputs and ones.

    They are formed in the wide dtype, in the gradients themselves where these have it. With `complete` there is one
    block, and the sum is rounded to the gradients as it is formed.
    """

    def __init__(self, head: Head, rows: Rows, out: Gradients, *, complete: bool) -> None:
        hidden_RH = rows.hidden_CH
        ones_R1 = hidden_RH.new_ones(len(hidden_RH), 1) if len(out.bias_V) else None
        terms = (
            (out.weight_VH, hidden_RH),
            (out.bias_V[:, None], ones_R1),
            (out.adapter_VA, rows.adapter_CA),
        )
        self.terms = [(gradient_VX, x_RX) for gradient_VX, x_RX in terms if len(gradient_VX) and x_RX is not None]
        self.complete = complete and hidden_RH.dtype != wide(hidden_RH.dtype)
        self.fp16_scale = None
        if operand(hidden_RH[:0]).dtype == torch.float16:
            self.fp16_scale = max(abs(head.logit_scale / head.temperature), 1.0)
        self.totals: list[torch.Tensor] = []
        self.own: list[torch.Tensor] = []  # of the group at hand, where the totals hold others already
        self.apart = False

    def open(self, *, signed: bool) -> None:
        """Begin a group; if it is signed, its sum stays apart from those before."""
        self.apart = signed and bool(self.totals)
        self.own = []

    def add(self, rows: slice, E_BV: torch.Tensor, factor_B: torch.Tensor, weight_B: torch.Tensor) -> None:
        """Add a block of rows."""
        unit = None
        if self.fp16_scale is not None:
            unit = FP16_ROOM / (weight_B.abs().amax() * self.fp16_scale).clamp(min=1e-20)
            weight_B = weight_B * unit
        a_B1 = (factor_B * weight_B)[:, None]
        sums = self.own if self.apart else self.totals
        fresh = not sums
        for i, (gradient_VX, x_RX) in enumerate(self.terms):
            x_BX = (x_RX[rows] * a_B1).to(E_BV.dtype)
            if self.complete:
                _product_to(gradient_VX, E_BV, x_BX, unit)
                continue
            if fresh:
                # the wide dtype is that of the gradient itself, or that of a sum which is rounded at the end
                kept = gradient_VX if gradient_VX.dtype == wide(x_BX.dtype) and not self.apart else None
                sum_VX = product(E_BV.T, x_BX, out=kept)
                sums.append(sum_VX if unit is None else sum_VX.div_(unit))
            elif unit is None:
                add_product_(sums[i], E_BV.T, x_BX)
            else:
                sums[i].addcdiv_(product(E_BV.T, x_BX), unit)

    def scale(self, slope_1: torch.Tensor) -> None:
        """Multiply the sum of a signed group by the number that its rows waited for."""
        for i, own_VX in enumerate(self.own):
            self.totals[i].addcmul_(own_VX, slope_1.to(own_VX.dtype))
        if not self.apart:
            for sum_VX in self.totals:
                sum_VX.mul_(slope_1.to(sum_VX.dtype))
        self.own = []

    def finish(self) -> None:
        """Round the sums to the gradients; no block at all is a gradient of 0."""
        for i, (gradient_VX, _) in enumerate(self.terms):
            if self.totals and self.totals[i] is not gradient_VX:
                gradient_VX.copy_(self.totals[i])


def _product_to(gradient_VX: torch.Tensor, E_BV: torch.Tensor, x_BX: torch.Tensor, unit: torch.Tensor | None) -> None:
    """`E^T x`, divided by `unit` where given, rounded to a narrower dtype."""
    if E_BV.dtype == gradient_VX.dtype and unit is None:
        torch.mm(E_BV.T, x_BX, out=gradient_VX)
        return
    V, X = gradient_VX.shape
    columns = max(1, (GPU_PART_BYTES if E_BV.is_cuda else COPY_BYTES) // (X * 4))
    for start in range(0, V, columns):
        block = slice(start, min(start + columns, V))
        sum_BX = product(E_BV[:, block].T, x_BX)
        gradient_VX[block] = sum_BX if unit is None else sum_BX.div_(unit)
