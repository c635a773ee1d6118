"""The run of `linear_token_dpo`: components pass through the head, and leave their loss and all gradients.

R head rows, V vocabulary, H hidden size, A rank of the adapter, X one of H and A, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ttpa_kernels.linear_logp.chunks import Head, Rows, exponentials, logps, product_with_head
from ttpa_kernels.linear_logp.passes import Gradients, Needs
from ttpa_kernels.linear_logp.plan import kept_dtype
from ttpa_kernels.linear_token_dpo.plan import Group, Plan, row_length
from ttpa_kernels.linear_token_dpo.sums import HeadSums
from ttpa_kernels.numerics import operand, wide
from ttpa_kernels.token_dpo.pairs import Structure
from ttpa_kernels.token_dpo.segments import Loss, PairValues, Part, pair_values_, row_gradients_


class RowGradient(NamedTuple):
    """A gradient of the rows' inputs before and after it is multiplied by that of their log-probabilities, and the
    matrix of the head that it comes through."""

    unscaled_RX: torch.Tensor
    result_RX: torch.Tensor
    matrix_VX: torch.Tensor


@dataclass
class Stream:
    """Everything that the groups of a run share.

    `rows` and `ref_rows` are the rows with a coefficient in the order of `structure.order_R`; `logp_R`, `ref_logp_R`,
    `gradient_R` (of the loss in the log-probabilities) and `out` are in the original order. With `in_order` the two
    orders are the same. `ref_rows` is None where `ref_logp_R` is given, or absent.
    """

    plan: Plan
    head: Head
    rows: Rows
    ref_head: Head
    ref_rows: Rows | None
    structure: Structure
    loss: Loss
    needs: Needs
    in_order: bool
    logp_R: torch.Tensor
    ref_logp_R: torch.Tensor | None
    gradient_R: torch.Tensor
    values: PairValues
    out: Gradients
    E_BV: torch.Tensor = field(init=False)
    sums: HeadSums | None = field(init=False, default=None)
    row_gradients: list[RowGradient] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        hidden_RH, V = self.rows.hidden_CH, len(self.head.weight_VH)
        dtype = operand(hidden_RH[:0]).dtype
        needed = any(self.needs) or (self.plan.engine == "torch" and dtype == wide(dtype))
        shape = self.plan.block_rows if needed else 0, row_length(V, hidden_RH.device)
        self.E_BV = hidden_RH.new_empty(shape, dtype=dtype)[:, :V]
        if self.needs.weight or self.needs.bias or self.needs.adapter:
            complete = len(self.plan.groups) == 1 and self.plan.groups[0].kept_rows == self.plan.rows
            self.sums = HeadSums(self.head, self.rows, self.out, complete=complete)
        for result_RX, matrix_VX in (
            (self.out.hidden_RH, self.head.weight_VH),
            (self.out.adapter_RA, self.head.adapter_VA),
        ):
            if len(result_RX) and matrix_VX is not None:
                if not self.in_order:
                    result_RX.zero_()
                unscaled_RX, kept = result_RX, kept_dtype(result_RX.dtype)
                if kept != result_RX.dtype:
                    unscaled_RX = torch.empty_like(result_RX, dtype=kept)
                self.row_gradients.append(RowGradient(unscaled_RX, result_RX, matrix_VX))

    def run(self) -> None:
        for group in self.plan.groups:
            if self.sums is not None:
                self.sums.open(signed=group.kind == "signed")
            if group.kind == "kept":
                self._keep(group)
            else:
                self._pass(group)
        if self.sums is not None:
            self.sums.finish()

    def _keep(self, group: Group) -> None:
        """Exponentials first, then the loss, then all products; rows beyond those kept are computed twice."""
        rows, middle = group.part.rows, group.part.rows.start + group.kept_rows
        kept, others = slice(rows.start, middle), slice(middle, rows.stop)
        self._reference(others)
        self._logps(self.head, self.rows, others, self.logp_R)
        self._reference(kept)
        factor_B = self._fill(kept)
        self._differentiate(group.part)
        self._products(kept, factor_B)
        for block in _pieces(others, self.plan.block_rows):
            self._products(block, self._fill(block, again=True))

    def _pass(self, group: Group) -> None:
        """Products before the loss, without the factors that it gives; these come last."""
        rows, signed = group.part.rows, group.kind == "signed"
        for block in _pieces(rows, self.plan.block_rows):
            self._reference(block)
            if not any(self.needs):
                self._logps(self.head, self.rows, block, self.logp_R)
                continue
            factor_B = self._fill(block)
            E_BV = self.E_BV[: len(factor_B)]
            for gradient in self.row_gradients:
                product_BX = product_with_head(E_BV, gradient.matrix_VX)
                self._put(gradient.unscaled_RX, block, product_BX.mul_(factor_B[:, None]))
            if signed:
                assert self.sums is not None
                entries = slice(*(group.part.entries.start + r - rows.start for r in (block.start, block.stop)))
                self.sums.add(block, E_BV, factor_B, self.structure.coefficient_E[entries].to(factor_B.dtype))
        self._differentiate(group.part)
        for gradient in self.row_gradients:
            for block in _pieces(rows, self.plan.block_rows):
                g_B1 = self._get(self.gradient_R, block)[:, None]
                self._put(gradient.result_RX, block, self._get(gradient.unscaled_RX, block) * g_B1)
        if signed:
            assert self.sums is not None
            self.sums.scale(self.values.slope_P[self.structure.order_P[group.part.pairs]])

    def _reference(self, rows: slice) -> None:
        """The reference in chunks of its own: the same sizes as the policy's, so that equal inputs give equal bits."""
        if self.ref_rows is not None and self.ref_logp_R is not None:
            self._logps(self.ref_head, self.ref_rows, rows, self.ref_logp_R)

    def _logps(self, head: Head, rows: Rows, span: slice, out_R: torch.Tensor) -> None:
        """Log-probabilities alone. On the CPU their logits pass through the memory of the exponentials."""
        shared = self.plan.engine == "torch" and self.E_BV.dtype == wide(self.E_BV.dtype)
        for chunk in _pieces(span, self.plan.chunk_rows):
            logits_CV = self.E_BV[: chunk.stop - chunk.start] if shared else None
            logp_C, _ = logps(head, rows.chunk(chunk), engine=self.plan.engine, out=logits_CV)
            self._put(out_R, chunk, logp_C)

    def _fill(self, rows: slice, *, again: bool = False) -> torch.Tensor:
        """Exponentials of a block; returns their factors. `again`: the log-probabilities are there already."""
        factor_B = self.logp_R.new_empty(rows.stop - rows.start)
        for chunk in _pieces(rows, self.plan.chunk_rows):
            place = slice(chunk.start - rows.start, chunk.stop - rows.start)
            result = exponentials(self.head, self.rows.chunk(chunk), engine=self.plan.engine, out=self.E_BV[place])
            factor_B[place] = result.factor_C
            if not again:
                self._put(self.logp_R, chunk, result.logp_C)
        return factor_B

    def _differentiate(self, part: Part) -> None:
        """The loss of the pairs, and its gradient in the log-probabilities of their rows."""
        engine, C = self.plan.engine, self.structure
        pair_values_(self.values, C, part, self.logp_R, self.ref_logp_R, self.loss, engine=engine)
        if any(self.needs):
            row_gradients_(self.gradient_R, C, part, self.values.slope_P, engine=engine)

    def _products(self, rows: slice, factor_B: torch.Tensor) -> None:
        """Add a block whose exponentials are in memory to all gradients."""
        E_BV, g_B = self.E_BV[: len(factor_B)], self._get(self.gradient_R, rows)
        for gradient in self.row_gradients:
            product_BX = product_with_head(E_BV, gradient.matrix_VX)
            self._put(gradient.result_RX, rows, product_BX.mul_((factor_B * g_B)[:, None]))
        if self.sums is not None:
            self.sums.add(rows, E_BV, factor_B, g_B)

    def _get(self, x_R: torch.Tensor, rows: slice) -> torch.Tensor:
        return x_R[rows] if self.in_order else x_R[self.structure.order_R[rows]]

    def _put(self, x_R: torch.Tensor, rows: slice, value_C: torch.Tensor) -> None:
        if self.in_order:
            x_R[rows] = value_C
        else:
            x_R[self.structure.order_R[rows]] = value_C.to(x_R.dtype)


def _pieces(rows: slice, size: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, max(size, 1)):
        yield slice(start, min(start + size, rows.stop))
