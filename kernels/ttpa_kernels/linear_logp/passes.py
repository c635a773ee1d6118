"""The two passes over the head: results and what is kept in chunks of rows, gradients in blocks of the vocabulary.

R head rows, K of them kept, C rows of a chunk, V vocabulary, H hidden size, A rank of the adapter, X one of H and A.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ttpa_kernels.linear_logp.chunks import (
    STATS,
    Head,
    Rows,
    Upstream,
    exponentials,
    logit_gradients,
    logps,
    logps_and_lse,
    product_with_head,
)
from ttpa_kernels.linear_logp.plan import Keeps, Layout, kept_dtype, row_stride
from ttpa_kernels.numerics import add_product_, operand, product, wide


class Needs(NamedTuple):
    """Which inputs get a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    adapter_input: bool
    adapter: bool

    @property
    def keeps(self) -> Keeps:
        """A gradient of the head sums over rows and needs their upstream gradients first, so it keeps E; for a frozen
        head the input's gradient is formed at once."""
        if self.weight or self.bias or self.adapter:
            return "exponentials"
        return "gradient" if self.hidden or self.adapter_input else "nothing"


class Results(NamedTuple):
    """What the forward pass returns and keeps; what does not apply has no elements."""

    logp_R: torch.Tensor
    stats_SR: torch.Tensor
    lse_L: torch.Tensor  # of the rows that are not kept, where it is not among the statistics
    factor_K: torch.Tensor
    E_KV: torch.Tensor
    gradient_RH: torch.Tensor  # of the log-probabilities, not yet scaled by their upstream gradients
    gradient_RA: torch.Tensor


class Gradients(NamedTuple):
    """Gradients of the inputs; those not needed have no elements."""

    hidden_RH: torch.Tensor
    weight_VH: torch.Tensor
    bias_V: torch.Tensor
    adapter_RA: torch.Tensor
    adapter_VA: torch.Tensor


def allocate(head: Head, rows: Rows, layout: Layout, needs: Needs, *, stats: bool) -> Results:
    """The tensors of the forward pass, not filled."""
    new, dtype, keeps = rows.hidden_CH.new_empty, wide(rows.hidden_CH.dtype), needs.keeps
    (R, H), V = rows.hidden_CH.shape, head.weight_VH.shape[0]
    A = 0 if rows.adapter_CA is None else rows.adapter_CA.shape[1]
    K = layout.kept_rows if keeps == "exponentials" else 0
    L = R - K if keeps == "exponentials" and not stats and rows.hidden_CH.dtype != dtype else 0
    early = kept_dtype(rows.hidden_CH.dtype)
    return Results(
        logp_R=new(R, dtype=dtype),
        stats_SR=new(len(STATS), R if stats else 0, dtype=dtype),
        lse_L=new(L, dtype=dtype),
        factor_K=new(K, dtype=dtype),
        E_KV=new(K, row_stride(V), dtype=operand(rows.hidden_CH[:0]).dtype)[:, :V],
        gradient_RH=new(R if keeps == "gradient" and needs.hidden else 0, H, dtype=early),
        gradient_RA=new(R if keeps == "gradient" and needs.adapter_input else 0, A, dtype=early),
    )


def forward_pass(head: Head, rows: Rows, layout: Layout, needs: Needs, *, stats: bool) -> Results:
    """Log-probabilities (and statistics) of R rows, and what their gradient needs."""
    results, keeps = allocate(head, rows, layout, needs, stats=stats), needs.keeps
    engine, R, C = layout.engine, len(rows.hidden_CH), layout.chunk_rows
    num_kept = 0 if keeps == "nothing" else layout.kept_rows
    if layout.converts_once:
        head = head.columns(slice(None))
    factor_dtype = operand(rows.hidden_CH[:0]).dtype
    buffer_CV: torch.Tensor | None = None
    if len(results.E_KV):
        buffer_CV = results.E_KV[:C]
    elif keeps == "gradient" or (engine == "torch" and factor_dtype == wide(factor_dtype)):
        V = len(head.weight_VH)
        buffer_CV = rows.hidden_CH.new_empty(min(C, R), row_stride(V), dtype=factor_dtype)[:, :V]
    # Rows that are not kept come first, because they pass through the memory of those that are.
    for start in reversed(range(0, R, C)):
        span = slice(start, min(start + C, R))
        chunk, out_CV = rows.chunk(span), None if buffer_CV is None else buffer_CV[: span.stop - start]
        stats_SC: torch.Tensor | None = None
        if start >= num_kept:
            logits_CV = out_CV if factor_dtype == wide(factor_dtype) else None
            if len(results.lse_L):
                lse_C = results.lse_L[start - num_kept : span.stop - num_kept]
                results.logp_R[span], lse_C[:] = logps_and_lse(head, chunk, engine=engine, out=logits_CV)
            else:
                results.logp_R[span], stats_SC = logps(head, chunk, engine=engine, stats=stats, out=logits_CV)
        else:
            if keeps == "exponentials" and span.stop <= num_kept:
                out_CV = results.E_KV[span]
            E_CV, factor_C, results.logp_R[span], stats_SC = exponentials(
                head, chunk, engine=engine, stats=stats, out=out_CV
            )
            if keeps == "exponentials":
                kept = slice(start, min(span.stop, num_kept))
                results.factor_K[kept] = factor_C[: kept.stop - start]
                if span.stop > num_kept:
                    results.E_KV[kept] = E_CV[: kept.stop - start]
            for gradient_RX, matrix_VX in (
                (results.gradient_RH, head.weight_VH),
                (results.gradient_RA, head.adapter_VA),
            ):
                if len(gradient_RX) and matrix_VX is not None:
                    gradient_RX[span] = product_with_head(E_CV, matrix_VX).mul_(factor_C[:, None])
        if stats_SC is not None:
            results.stats_SR[:, span] = stats_SC
    return results


def backward_pass(
    head: Head, rows: Rows, layout: Layout, results: Results, upstream: Upstream, *, out: Gradients
) -> None:
    """Fill `out` with the gradients of a loss, from those of its log-probabilities, log-sum-exps and entropies.

    Rows that are kept cost a product for each gradient. The logits of others, and of all rows where the log-sum-exp
    or the entropy has an upstream gradient, are computed again.
    """
    R, C = len(rows.hidden_CH), layout.chunk_rows
    only_logp = upstream.lse_C is None and upstream.entropy_C is None
    if only_logp and (len(results.gradient_RH) or len(results.gradient_RA)):
        assert upstream.logp_C is not None
        for start in range(0, R, C):
            span = slice(start, min(start + C, R))
            for gradient_RX, early_RX in ((out.hidden_RH, results.gradient_RH), (out.adapter_RA, results.gradient_RA)):
                if len(gradient_RX):
                    gradient_RX[span] = early_RX[span] * upstream.logp_C[span, None]
        return
    if not only_logp:
        results = results._replace(E_KV=results.E_KV[:0], factor_K=results.factor_K[:0])
    everything_kept = len(results.E_KV) == R and rows.hidden_CH.dtype == results.E_KV.dtype != torch.float16
    if everything_kept or rows.hidden_CH.dtype == wide(rows.hidden_CH.dtype):
        _backward_by_rows(head, rows, layout, results, upstream, out)
    else:
        _backward_by_columns(head, rows, layout, results, upstream, out)


def _backward_by_rows(
    head: Head, rows: Rows, layout: Layout, results: Results, upstream: Upstream, out: Gradients
) -> None:
    """All kept rows at once, then chunks of the others, whose products add up in the gradients themselves.

    Only where these need no rounding in between: fp32 and fp64, or a single product. The exponentials of a chunk come
    from the sum of the same logits, so that they sum to one whatever rounding the logits have.
    """
    R, V, K = len(rows.hidden_CH), len(head.weight_VH), len(results.E_KV)
    spans = [slice(0, K)] if K else []
    spans += [slice(start, min(start + layout.again_size, R)) for start in range(K, R, layout.again_size)]
    factor_dtype = results.E_KV.dtype
    buffer_CV = results.E_KV.new_empty(min(layout.again_size, R - K), row_stride(V))[:, :V]
    for span in spans:
        chunk, g = rows.chunk(span), upstream.rows(span)
        factor_C1: torch.Tensor | None = None
        if span.stop <= K:
            assert g.logp_C is not None
            E_CV, factor_C1 = results.E_KV, (results.factor_K * g.logp_C)[:, None]
        elif g.lse_C is None and g.entropy_C is None:
            assert g.logp_C is not None
            logits_CV = buffer_CV[: span.stop - span.start]
            E_CV, factor_C, _, _ = exponentials(head, chunk, engine=layout.engine, out=logits_CV)
            factor_C1 = (factor_C * g.logp_C)[:, None]
        else:
            E_CV = logit_gradients(head, chunk, g, out=buffer_CV[: span.stop - span.start])
        for gradient_RX, matrix_VX in ((out.hidden_RH, head.weight_VH), (out.adapter_RA, head.adapter_VA)):
            if len(gradient_RX) and matrix_VX is not None:
                part_CX = product(E_CV, matrix_VX)
                gradient_RX[span] = part_CX if factor_C1 is None else part_CX.mul_(factor_C1)
        for gradient_VX, X_CX in _outer(chunk, out):
            right_CX = X_CX if factor_C1 is None else (X_CX * factor_C1).to(factor_dtype)
            if span.start == 0:
                torch.mm(E_CV.T, right_CX, out=gradient_VX)
            else:
                add_product_(gradient_VX, E_CV.T, right_CX)
        if len(out.bias_V):
            sum_V = _column_sums(E_CV, factor_C1)
            out.bias_V.copy_(sum_V if span.start == 0 else sum_V.add_(out.bias_V))


def _backward_by_columns(
    head: Head, rows: Rows, layout: Layout, results: Results, upstream: Upstream, out: Gradients
) -> None:
    """Half precision: all rows for a block of the vocabulary at a time.

    So a block of a weight's gradient is a complete sum in fp32 that is rounded once, and no fp32 `[V, H]` exists.
    """
    dtype, factor_dtype = wide(rows.hidden_CH.dtype), results.E_KV.dtype
    R, V, K = len(rows.hidden_CH), len(head.weight_VH), len(results.E_KV)
    unit = _fp16_unit(head, upstream) if factor_dtype == torch.float16 else None
    if unit is not None:
        upstream = Upstream(*(None if g is None else g * unit for g in upstream))
    factor_K1 = results.factor_K[:, None]
    if upstream.logp_C is not None:
        factor_K1 = factor_K1 * upstream.logp_C[:K, None]
    outer = [(g_VX, (X_RX[:K] * factor_K1).to(factor_dtype), operand(X_RX[K:])) for g_VX, X_RX in _outer(rows, out)]
    sum_RH, sum_RA = (rows.hidden_CH.new_zeros(g.shape, dtype=dtype) for g in (out.hidden_RH, out.adapter_RA))
    again, g = rows.chunk(slice(K, None)), upstream.rows(slice(K, None))
    lse_C = results.stats_SR[0, K:] if results.stats_SR.shape[1] else results.lse_L
    entropy_C = None if g.entropy_C is None else results.stats_SR[1, K:]
    buffer = sum_RH.new_empty((R - K) * min(V, layout.again_size))
    for start in range(0, V, layout.again_size):
        block = slice(start, min(start + layout.again_size, V))
        part = head.columns(block)
        pieces = [(slice(0, K), results.E_KV[:, block])] if K else []
        if K < R:
            logits_CB = buffer[: (R - K) * (block.stop - start)].view(R - K, -1)
            dz_CB = logit_gradients(part, again, g, lse_C=lse_C, entropy_C=entropy_C, start=start, out=logits_CB)
            pieces.append((slice(K, R), dz_CB))
        for sum_RX, matrix_BX in ((sum_RH, part.weight_VH), (sum_RA, part.adapter_VA)):
            if len(sum_RX) and matrix_BX is not None:
                for span, E_CB in pieces:
                    add_product_(sum_RX[span], E_CB, matrix_BX)
        for gradient_VX, kept_KX, again_CX in outer:
            sum_BX = sum_RH.new_empty(gradient_VX[block].shape)
            for i, (span, E_CB) in enumerate(pieces):
                right_CX = kept_KX if span.start < K else again_CX
                if i:
                    add_product_(sum_BX, E_CB.T, right_CX)
                else:
                    product(E_CB.T, right_CX, out=sum_BX)
            gradient_VX[block] = sum_BX if unit is None else sum_BX.div_(unit)
        if len(out.bias_V):
            sums = [_column_sums(E_CB, factor_K1 if span.start < K else None) for span, E_CB in pieces]
            sum_B = torch.stack(sums).sum(dim=0)
            out.bias_V[block] = sum_B if unit is None else sum_B.div_(unit)
    for gradient_RX, sum_RX in ((out.hidden_RH, sum_RH), (out.adapter_RA, sum_RA)):
        if len(gradient_RX):
            sum_RX[:K] *= factor_K1
            gradient_RX.copy_(sum_RX if unit is None else sum_RX.div_(unit))


def _outer(rows: Rows, out: Gradients) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The gradients of the head's matrices that are needed, each with the matrix X of the rows in its `E^T X`."""
    pairs = ((out.weight_VH, rows.hidden_CH), (out.adapter_VA, rows.adapter_CA))
    return [(gradient_VX, X_RX) for gradient_VX, X_RX in pairs if len(gradient_VX) and X_RX is not None]


def _column_sums(E_CV: torch.Tensor, factor_C1: torch.Tensor | None) -> torch.Tensor:
    """`E^T a` in the wide dtype, for a = 1 where there is no factor.

    One number a row weighs all of its row, so in half precision its rounding goes along as a second column.
    """
    if factor_C1 is None:
        return product(E_CV.T, E_CV.new_ones(len(E_CV), 1))[:, 0]
    if factor_C1.dtype == E_CV.dtype:
        return product(E_CV.T, factor_C1)[:, 0]
    rounded_C1 = factor_C1.to(E_CV.dtype)
    right_C2 = torch.cat([rounded_C1, (factor_C1 - rounded_C1).to(E_CV.dtype)], dim=1)
    return product(E_CV.T, right_C2).sum(dim=1)


def _fp16_unit(head: Head, upstream: Upstream) -> torch.Tensor:
    """The factor that brings upstream gradients to where fp16 holds the gradients of logits with most digits."""
    largest = torch.stack([g.abs().amax() for g in upstream if g is not None]).amax()
    room = 2.0**11 if upstream.entropy_C is None else 2.0**7  # p log p can be 16 times as large as p
    scale = abs(head.logit_scale / head.temperature)
    return room / (largest * max(scale, 1.0)).clamp(min=1e-30)  # all may be 0
