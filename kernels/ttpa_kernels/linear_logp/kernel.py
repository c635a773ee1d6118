"""Triton kernels of the head: tiles of logits, their exponentials and sums, folded into log-probabilities.

C rows of a chunk, H hidden size, V vocabulary, A rank of the head's adapter, T strips of the vocabulary, F partial
results of a strip. The kernels take logits in units of ln 2, `z = outer * x` with `x` the raw logit or, with a softcap,
`x = tanh(inner * raw)`. The exponentials of a strip are `2^(z - k)` with an integer k, so that another k is an exact
factor; README.md says how k is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ttpa_kernels.configs import (
    LINEAR_LOGP,
    LINEAR_LOGP_FP32,
    LINEAR_LOGP_POINTERS,
    LINEAR_LOGP_POINTERS_WIDE,
    LINEAR_LOGP_WIDE,
    LogitTile,
)
from ttpa_kernels.engine import architecture, descriptors_fit
from ttpa_kernels.linear_logp.chunks import HALF_SCALE, STATS, Exponentials, Head, Rows
from ttpa_kernels.numerics import dot_precision

if TYPE_CHECKING:
    from ttpa_kernels.ahead import Variant

PARTIALS = ("k", "sum e")  # of each strip and row, e = 2^(z - k); with statistics also those below
STATS_PARTIALS = ("sum e (z - k)", "sum e^2", "sum x", "max z", "first column of the max")
GROUP_BYTES = 16 << 20  # hidden states of the row tiles that pass over the vocabulary together, to stay in the L2 cache
REACH = 40.0  # a strip takes its row's k unless a logit exceeds that by more: squares of e stay within fp32
ROWS = 32  # rows of a program of the fold
STRIPS = 32  # strips that it takes at a time, and strips of a program of the rescaling

LOWEST = tl.constexpr(-1e30)  # stands for a reference of -inf, whose differences would be NaN
LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2.0))
E_SCALE = tl.constexpr(HALF_SCALE)


@triton.jit
def _tanh(x):
    """A polynomial near 0 (relative error 3e-9 before rounding), `1 - 2 / (1 + e^2|x|)` elsewhere."""
    a = tl.abs(x)
    square = x * x
    p = tl.fma(square, -0.00590586474, 0.0208053813)
    p = tl.fma(square, p, -0.0537866825)
    p = tl.fma(square, p, 0.133319582)
    p = tl.fma(square, p, -0.333332993)
    far = 1.0 - 2.0 / (1.0 + tl.exp2(a * 2.885390081777927))
    return tl.where(a < 0.6, tl.fma(x * square, p, x), tl.where(x < 0.0, -far, far))


@triton.jit
def _add_adapter(acc, u, B, u_rows, row_mask, B_rows, B_mask, A, A_STEP: tl.constexpr, PRECISION: tl.constexpr):
    """`acc + u B^T` for some rows of u and some of B."""
    for a in range(0, A, A_STEP):
        column = a + tl.arange(0, A_STEP)
        inside = (column < A)[None, :]
        left = tl.load(u + u_rows[:, None] * A + column[None, :], mask=row_mask[:, None] & inside, other=0.0)
        right = tl.load(B + B_rows[:, None] * A + column[None, :], mask=B_mask[:, None] & inside, other=0.0)
        acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _reference(x, outer):
    """The integer nearest to the target's logit."""
    return tl.minimum(tl.maximum(tl.floor(tl.fma(x, outer, 0.5)), LOWEST), -LOWEST)


@triton.jit
def _target_logits(
    hidden,
    weight,
    bias,
    u,
    B,
    target,
    at_target,
    R,
    V,
    H,
    A,
    hidden_stride,
    weight_stride,
    inner,
    M: tl.constexpr,
    K: tl.constexpr,
    A_STEP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The target's x of each row, NaN where the target is no token.

    In: `hidden [R, H]`, `weight [V, H]`, `bias [V]`, the adapter's `u [R, A]` and `B [V, A]`, `target [R]` int64.
    Out: `at_target [R]` fp32. Grid: R / M programs; each multiplies M rows with the M rows of W that are their targets,
    step by step as `_tiles` does so that the bits are the same, and keeps the diagonal.
    """
    rows = tl.program_id(0) * M + tl.arange(0, M)
    token = tl.load(target + rows, mask=rows < R, other=-1)
    known = (token >= 0) & (token < V)
    row_offset, token_offset = rows.to(tl.int64), tl.where(known, token, 0)
    acc = tl.zeros((M, M), tl.float32)
    if bias is not None:
        acc += tl.load(bias + token_offset).to(tl.float32)[None, :]
    for k in range(0, tl.cdiv(H, K)):
        column = k * K + tl.arange(0, K)
        inside = (column < H)[None, :]
        left_at = hidden + row_offset[:, None] * hidden_stride + column[None, :]
        right_at = weight + token_offset[:, None] * weight_stride + column[None, :]
        left = tl.load(left_at, mask=(rows < R)[:, None] & inside, other=0.0)
        acc = tl.dot(left, tl.load(right_at, mask=inside, other=0.0).T, acc, input_precision=PRECISION)
    if u is not None:
        acc = _add_adapter(acc, u, B, row_offset, rows < R, token_offset, known, A, A_STEP, PRECISION)
    if SOFTCAP:
        acc = _tanh(acc * inner)
    diagonal = tl.arange(0, M)[:, None] == tl.arange(0, M)[None, :]
    x = tl.sum(tl.where(diagonal, acc, 0.0), axis=1)
    tl.store(at_target + rows, tl.where(known, x, float("nan")), mask=rows < R)


@triton.jit
def _strips(
    x,
    reference,
    m,
    n,
    E,
    partials,
    E_stride,
    R,
    V,
    outer,
    reach,
    hole,
    M: tl.constexpr,
    N: tl.constexpr,
    STRIP: tl.constexpr,
    STORE_BLOCKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    STATS: tl.constexpr,
    DTYPE: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """Store `2^(z - k)` and partial results of the tile [M, N] at row m and column n, one strip of columns after the
    other, so that few of them are in registers."""
    if N > STRIP:
        left, right = tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)).split()
        _strips(
            left, reference, m, n, E, partials, E_stride, R, V, outer, reach, hole,
            M, N // 2, STRIP, STORE_BLOCKS, SOFTCAP, NEGATIVE, STATS, DTYPE, NORMALISE,
        )  # fmt: skip
        _strips(
            right, reference, m, n + N // 2, E, partials, E_stride, R, V, outer, reach, hole,
            M, N // 2, STRIP, STORE_BLOCKS, SOFTCAP, NEGATIVE, STATS, DTYPE, NORMALISE,
        )  # fmt: skip
    else:
        extreme = tl.min(x, axis=1) if NEGATIVE else tl.max(x, axis=1)
        top = extreme * outer
        k = tl.where(top - reference <= reach, reference, tl.maximum(tl.ceil(top), LOWEST))
        d = tl.fma(x, outer, -k[:, None])
        e = tl.exp2(d)
        total = tl.sum(e, axis=1)
        if STATS:
            weighted = tl.sum(tl.where(e == 0.0, 0.0, e * d), axis=1)
            squares = tl.sum(e * e, axis=1)
        rows = m + tl.arange(0, M)
        if E is not None:
            if SOFTCAP:
                e *= 1.0 - x * x
            if NORMALISE:
                e *= E_SCALE
            if STORE_BLOCKS:
                E.store([m, n], e.to(DTYPE))
            else:
                columns = n + tl.arange(0, N)
                at = E + rows.to(tl.int64)[:, None] * E_stride + columns[None, :]
                tl.store(at, e.to(DTYPE), mask=(rows < R)[:, None] & (columns < V)[None, :])
        T = tl.cdiv(V, STRIP)  # after the exponentials are stored, for want of registers
        mask = rows < tl.where(n < V, R, 0)
        strip = n // STRIP
        tl.store(partials + strip.to(tl.int64) * R + rows, k, mask=mask)
        tl.store(partials + (T + strip).to(tl.int64) * R + rows, total, mask=mask)
        if STATS:
            tl.store(partials + (2 * T + strip).to(tl.int64) * R + rows, weighted, mask=mask)
            tl.store(partials + (3 * T + strip).to(tl.int64) * R + rows, squares, mask=mask)
            sum_x = tl.sum(tl.where(x == hole, 0.0, x), axis=1)
            tl.store(partials + (4 * T + strip).to(tl.int64) * R + rows, sum_x, mask=mask)
            tl.store(partials + (5 * T + strip).to(tl.int64) * R + rows, top, mask=mask)
            column = (n + tl.arange(0, N)).to(tl.float32)[None, :]
            first = tl.min(tl.where(x == extreme[:, None], column, float("inf")), axis=1)
            tl.store(partials + (6 * T + strip).to(tl.int64) * R + rows, first, mask=mask)


@triton.jit
def _tiles(
    hidden,
    weight,
    bias,
    u,
    B,
    at_target,
    E,
    partials,
    R,
    V,
    H,
    A,
    hidden_stride,
    weight_stride,
    E_stride,
    inner,
    outer,
    outside,
    reach,
    group,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIP: tl.constexpr,
    A_STEP: tl.constexpr,
    BLOCKS: tl.constexpr,
    STORE_BLOCKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    STATS: tl.constexpr,
    DTYPE: tl.constexpr,
    NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Exponentials of tiles of logits and their sums.

    In: the head and its rows as `_target_logits` takes them (`hidden` and `weight` tensor descriptors with BLOCKS),
    and what it wrote. Out: `E [R, V]` (a descriptor with STORE_BLOCKS; may be None), and `partials [F, T, R]` fp32 as
    in PARTIALS and STATS_PARTIALS. Grid: at most one program a tile [M, N]; each takes every so many tiles.
    `group` row tiles pass over the vocabulary together, so that the tiles at work share rows of both matrices.
    """
    row_tiles = tl.cdiv(R, M)
    column_tiles = tl.cdiv(V, N)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        first_row_tile = tile // (group * column_tiles) * group
        in_group = tile % (group * column_tiles)
        height = tl.minimum(row_tiles - first_row_tile, group)
        m = (first_row_tile + in_group % height) * M
        column_tile = in_group // height
        n = column_tile * N

        # A column beyond the vocabulary starts at a value that adding zeros does not change. Known before the products,
        # it costs no registers while the exponentials need them.
        columns = n + tl.arange(0, N)
        start = tl.zeros((N,), tl.float32)
        if bias is not None:
            start += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)
        acc = tl.broadcast_to(tl.where(columns < V, start, outside)[None, :], (M, N))
        if BLOCKS:
            for k in range(0, tl.cdiv(H, K)):
                acc = tl.dot(hidden.load([m, k * K]), weight.load([n, k * K]).T, acc, input_precision=PRECISION)
        else:
            in_rows = (m + tl.arange(0, M) < R)[:, None]
            in_columns = (columns < V)[:, None]
            left_at = hidden + (m + tl.arange(0, M)).to(tl.int64)[:, None] * hidden_stride + tl.arange(0, K)[None, :]
            right_at = weight + columns.to(tl.int64)[:, None] * weight_stride + tl.arange(0, K)[None, :]
            for k in range(0, tl.cdiv(H, K)):
                inside = (k * K + tl.arange(0, K) < H)[None, :]
                left = tl.load(left_at + k * K, mask=in_rows & inside, other=0.0)
                right = tl.load(right_at + k * K, mask=in_columns & inside, other=0.0)
                acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
        if u is not None:
            rows = (m + tl.arange(0, M)).to(tl.int64)
            acc = _add_adapter(acc, u, B, rows, rows < R, columns.to(tl.int64), columns < V, A, A_STEP, PRECISION)

        hole = outside
        x = acc
        if SOFTCAP:
            hole = float("-inf")
            x = tl.where(acc == outside, hole, _tanh(acc * inner))
        rows = m + tl.arange(0, M)
        reference = _reference(tl.load(at_target + rows, mask=rows < R, other=0.0), outer)
        _strips(
            x, reference, m, n, E, partials, E_stride, R, V, outer, reach, hole,
            M, N, STRIP, STORE_BLOCKS, SOFTCAP, NEGATIVE, STATS, DTYPE, NORMALISE,
        )  # fmt: skip


@triton.jit
def _partial(partials, field, strips, rows, mask, R, T, other):
    """One of the partial results of some strips (first axis) and rows."""
    at = (field * T + strips).to(tl.int64)[:, None] * R + rows[None, :]
    return tl.load(partials + at, mask=mask, other=other)


@triton.jit
def _fold(
    partials,
    target,
    at_target,
    E,
    logp,
    factor,
    shift,
    stats,
    R,
    V,
    T,
    E_stride,
    outer,
    gain,
    ROWS: tl.constexpr,
    STRIPS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """Results of rows from the partial results of their strips.

    In: what `_target_logits` and `_tiles` wrote. Out: `logp [R]`, and where not None `factor [R]`, `shift [2, R]` (the
    row's k and the logarithm to base 2 that `_rescale` divides by), the target's column of `E [R, V]`, and
    `stats [5, R]` as in STATS. Grid: R / ROWS programs, which walk over the T strips in one order, whatever R is.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < R
    k_max = tl.full((ROWS,), LOWEST, tl.float32)
    for t in range(0, T, STRIPS):
        strips = t + tl.arange(0, STRIPS)
        k = _partial(partials, 0, strips, rows, (strips < T)[:, None] & mask[None, :], R, T, LOWEST)
        k_max = tl.maximum(k_max, tl.max(k, axis=0))

    total = tl.zeros((ROWS,), tl.float32)
    weighted, squares, sum_x = total, total, total
    top, first = total + float("-inf"), total + float("inf")
    for t in range(0, T, STRIPS):
        strips = t + tl.arange(0, STRIPS)
        inside = (strips < T)[:, None] & mask[None, :]
        d = _partial(partials, 0, strips, rows, inside, R, T, LOWEST) - k_max[None, :]
        scale = tl.exp2(d)
        sums = _partial(partials, 1, strips, rows, inside, R, T, 0.0)
        total += tl.sum(scale * sums, axis=0)
        if stats is not None:
            lifted = _partial(partials, 2, strips, rows, inside, R, T, 0.0) + d * sums
            weighted += tl.sum(tl.where(scale == 0.0, 0.0, scale * lifted), axis=0)
            squares += tl.sum(scale * scale * _partial(partials, 3, strips, rows, inside, R, T, 0.0), axis=0)
            sum_x += tl.sum(_partial(partials, 4, strips, rows, inside, R, T, 0.0), axis=0)
            tops = _partial(partials, 5, strips, rows, inside, R, T, float("-inf"))
            firsts = _partial(partials, 6, strips, rows, inside, R, T, float("inf"))
            higher = tl.maximum(top, tl.max(tops, axis=0))
            found = tl.min(tl.where(tops == higher[None, :], firsts, float("inf")), axis=0)
            first = tl.minimum(tl.where(top == higher, first, float("inf")), found)
            top = higher

    token = tl.load(target + rows, mask=mask, other=-1)
    x = tl.load(at_target + rows, mask=mask, other=0.0)
    z = tl.fma(x, outer, -k_max)
    log_total = tl.log2(total)
    p = (z - log_total) * LN_2
    tl.store(logp + rows, tl.where(p > 0.0, 0.0, p), mask=mask)
    if E is not None:
        value = tl.exp2(z) - total
        if NORMALISE:
            value *= E_SCALE / total
        if SOFTCAP:
            value *= 1.0 - x * x
        at = E + rows.to(tl.int64) * E_stride + token
        tl.store(at, value.to(E.dtype.element_ty), mask=mask & (token >= 0) & (token < V))
        tl.store(shift + rows, k_max, mask=mask)
        tl.store(shift + R + rows, log_total, mask=mask)
        divisor = tl.full((ROWS,), E_SCALE, tl.float32) if NORMALISE else total
        tl.store(factor + rows, gain / divisor, mask=mask)
    if stats is not None:
        at = stats + rows
        tl.store(at, (k_max + log_total) * LN_2, mask=mask)
        tl.store(at + R, (log_total - weighted / total) * LN_2, mask=mask)
        tl.store(at + 2 * R, (tl.log2(squares) - 2.0 * log_total) * LN_2, mask=mask)
        tl.store(at + 3 * R, sum_x * (outer * LN_2) / V, mask=mask)
        tl.store(at + 4 * R, (first == token.to(tl.float32)).to(tl.float32), mask=mask)


@triton.jit
def _rescale(
    E,
    partials,
    shift,
    target,
    R,
    V,
    T,
    E_stride,
    STRIP: tl.constexpr,
    ROWS: tl.constexpr,
    STRIPS: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """Bring the strips of E whose k is not that of their row to that one; with NORMALISE, divide all by the row's sum.

    In: the k of `partials [F, T, R]`, `shift [2, R]`, `target [R]`. In place: `E [R, V]` but for the targets' column.
    Grid: (R / ROWS, T / STRIPS) programs; where nothing is to be done, a program reads its k and ends.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < R
    k_row = tl.load(shift + rows, mask=mask, other=0.0)
    strips = tl.program_id(1) * STRIPS + tl.arange(0, STRIPS)
    inside = (strips < T)[:, None] & mask[None, :]
    k = _partial(partials, 0, strips, rows, inside, R, T, 0.0)
    differs = inside & (k != k_row[None, :])
    if NORMALISE or tl.max(tl.max(differs.to(tl.int32), axis=1), axis=0) > 0:
        token = tl.load(target + rows, mask=mask, other=-1)
        log_divisor = tl.zeros((ROWS,), tl.float32)
        if NORMALISE:
            log_divisor = tl.load(shift + R + rows, mask=mask, other=0.0)
        for t in range(tl.program_id(1) * STRIPS, tl.minimum(T, tl.program_id(1) * STRIPS + STRIPS)):
            k_strip = tl.load(partials + (tl.zeros((ROWS,), tl.int64) + t) * R + rows, mask=mask, other=0.0)
            change = mask & ((k_strip != k_row) | NORMALISE)
            if tl.max(change.to(tl.int32), axis=0) > 0:
                columns = t * STRIP + tl.arange(0, STRIP)
                at = E + rows.to(tl.int64)[:, None] * E_stride + columns[None, :]
                store = change[:, None] & (columns < V)[None, :] & (columns[None, :] != token[:, None])
                scale = tl.exp2(k_strip - k_row - log_divisor)
                e = tl.load(at, mask=store, other=0.0).to(tl.float32) * scale[:, None]
                tl.store(at, e.to(E.dtype.element_ty), mask=store)


def exponentials(
    head: Head, rows: Rows, *, stats: bool, out: torch.Tensor | None, config: LogitTile | None = None
) -> Exponentials:
    """`chunks.exponentials` of this engine; E has the dtype of `out`, else that of the hidden states on a GPU and fp32
    on the CPU."""
    R, V = len(rows.hidden_CH), len(head.weight_VH)
    E_CV = out
    if E_CV is None:
        dtype = rows.hidden_CH.dtype if rows.hidden_CH.is_cuda else torch.float32
        # Rows that begin at multiples of 16 bytes: cuBLAS reads others slowly, and tensor descriptors do not at all.
        E_CV = torch.empty(R, triton.cdiv(V, 8) * 8, dtype=dtype, device=rows.hidden_CH.device)[:, :V]
    assert E_CV.shape == (R, V) and E_CV.stride(1) == 1
    logp_C, factor_C, stats_SC = _run(head, rows, E_CV=E_CV, stats=stats, config=config)
    assert factor_C is not None
    return Exponentials(E_CV, factor_C, logp_C, stats_SC)


def logps(
    head: Head, rows: Rows, *, stats: bool, config: LogitTile | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunks.logps` of this engine."""
    logp_C, _, stats_SC = _run(head, rows, E_CV=None, stats=stats, config=config)
    return logp_C, stats_SC


def _run(
    head: Head, rows: Rows, *, E_CV: torch.Tensor | None, stats: bool, config: LogitTile | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`logp_C`, `factor_C` where there is E, and `stats_SC` where asked for."""
    hidden_CH, weight_VH, target_C = _rows_together(rows.hidden_CH), _rows_together(head.weight_VH), rows.target_C
    bias_V = None if head.bias_V is None else head.bias_V.contiguous()
    u_CA = None if rows.adapter_CA is None else rows.adapter_CA.contiguous()
    B_VA = None if head.adapter_VA is None else head.adapter_VA.contiguous()
    (R, H), V, A = hidden_CH.shape, len(weight_VH), 0 if u_CA is None else u_CA.shape[1]
    assert hidden_CH.dtype != torch.float64, "float64 is for the engine 'torch'"
    assert V < 1 << 24, "statistics hold columns in fp32"
    numbers = _Numbers.of(head, hidden_CH.dtype)
    blocks = hidden_CH.dtype != torch.float32 and descriptors_fit(hidden_CH, weight_VH)
    wide = stats or head.softcap is not None
    tile = config or _tile(hidden_CH.dtype, architecture(hidden_CH.device), blocks=blocks, wide=wide)
    T = triton.cdiv(V, tile.strip)

    def results(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, R, dtype=torch.float32, device=hidden_CH.device)

    logp_C, at_target_C = results(), results()
    factor_C, shift_2C = (None, None) if E_CV is None else (results(), results(2))
    stats_SC = results(len(STATS)) if stats else None
    if R == 0:
        return logp_C, factor_C, stats_SC
    partials_FTC = results(len(PARTIALS) + (len(STATS_PARTIALS) if stats else 0), T)

    store_blocks = E_CV is not None and blocks and descriptors_fit(E_CV)
    left: Any = TensorDescriptor.from_tensor(hidden_CH, [tile.M, tile.K]) if blocks else hidden_CH
    right: Any = TensorDescriptor.from_tensor(weight_VH, [tile.N, tile.K]) if blocks else weight_VH
    E: Any = TensorDescriptor.from_tensor(E_CV, [tile.M, tile.strip]) if store_blocks else E_CV
    E_stride = 0 if E_CV is None else E_CV.stride(0)
    normalise = E_CV is not None and E_CV.dtype == torch.float16
    programs = triton.cdiv(R, tile.M) * triton.cdiv(V, tile.N)
    if blocks:  # one program fills a processor, and begins its next tile while the last one is still being written
        programs = min(programs, _num_processors(hidden_CH.device))
    # `device_of` because Triton launches on the current device; it does nothing for tensors on the CPU
    with torch.cuda.device_of(hidden_CH):
        _target_logits[(triton.cdiv(R, tile.target_rows),)](
            *(hidden_CH, weight_VH, bias_V, u_CA, B_VA, target_C, at_target_C),
            *(R, V, H, A, hidden_CH.stride(0), weight_VH.stride(0), numbers.inner),
            M=tile.target_rows,
            K=tile.K,
            A_STEP=_adapter_step(A),
            SOFTCAP=numbers.softcap,
            PRECISION=dot_precision(hidden_CH.dtype),
            num_warps=4,
            num_stages=tile.num_stages,
        )
        _tiles[(programs,)](
            *(left, right, bias_V, u_CA, B_VA, at_target_C, E, partials_FTC),
            *(R, V, H, A, hidden_CH.stride(0), weight_VH.stride(0), E_stride),
            *(numbers.inner, numbers.outer, numbers.outside, numbers.reach),
            max(1, GROUP_BYTES // (tile.M * H * hidden_CH.element_size())),
            M=tile.M,
            N=tile.N,
            K=tile.K,
            A_STEP=_adapter_step(A),
            STRIP=tile.strip,
            BLOCKS=blocks,
            STORE_BLOCKS=store_blocks,
            SOFTCAP=numbers.softcap,
            NEGATIVE=numbers.outer < 0,
            STATS=stats,
            DTYPE=None if E_CV is None else _LANGUAGE_DTYPES[E_CV.dtype],
            NORMALISE=normalise,
            PRECISION=dot_precision(hidden_CH.dtype),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        _fold[(triton.cdiv(R, ROWS),)](
            *(partials_FTC, target_C, at_target_C, E_CV, logp_C, factor_C, shift_2C, stats_SC),
            *(R, V, T, E_stride, numbers.outer, numbers.gain),
            ROWS=ROWS,
            STRIPS=STRIPS,
            SOFTCAP=numbers.softcap,
            NORMALISE=normalise,
        )
        if E_CV is not None:
            _rescale[(triton.cdiv(R, ROWS), triton.cdiv(T, STRIPS))](
                *(E_CV, partials_FTC, shift_2C, target_C, R, V, T, E_stride),
                STRIP=tile.strip,
                ROWS=ROWS,
                STRIPS=STRIPS,
                NORMALISE=normalise,
            )
    return logp_C, factor_C, stats_SC


class _Numbers(NamedTuple):
    """Numbers of a head as the kernels take them."""

    inner: float
    outer: float
    outside: float
    reach: float
    gain: float
    softcap: bool

    @classmethod
    def of(cls, head: Head, dtype: torch.dtype) -> _Numbers:
        inner, outer = 1.0, head.logit_scale / head.temperature * LOG2_E
        if head.softcap is not None:
            inner, outer = head.logit_scale / head.softcap, head.softcap / head.temperature * LOG2_E
        # Never 0, so that columns outside the vocabulary vanish also where all logits are scaled to 0.
        outer = math.copysign(max(abs(outer), 2.0**-100), outer)
        # The exponentials of fp16 do not reach far: there every tile has a reference of its own.
        reach = -math.inf if dtype == torch.float16 else REACH
        gain = -head.logit_scale / head.temperature
        return cls(inner, outer, -math.copysign(2.0**127, outer), reach, gain, head.softcap is not None)


_LANGUAGE_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _rows_together(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _tile(dtype: torch.dtype, architecture: int, *, blocks: bool, wide: bool) -> LogitTile:
    """The tile; `wide` where what follows the product needs more registers.

    The logits and the sums of a strip have the same bits in the wide tile and in the other one, so a log-probability
    depends neither on what else is computed nor on the number of rows.
    """
    if dtype == torch.float32:
        return LINEAR_LOGP_FP32[architecture]
    if blocks:
        return (LINEAR_LOGP_WIDE if wide else LINEAR_LOGP)[architecture]
    return (LINEAR_LOGP_POINTERS_WIDE if wide else LINEAR_LOGP_POINTERS)[architecture]


def _adapter_step(A: int) -> int:
    return min(64, max(16, triton.next_power_of_2(A)))


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def variants(architecture: int) -> Iterator[Variant]:
    """The shipped kernels, for a head without options and for one with all of them; what other dtypes or fewer
    options compile to in the same way is left out."""
    for dtype, word in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        aligned = architecture >= 90 and word != "fp32"
        for options in (False, True) if word != "fp32" else (True,):
            tile = _tile(dtype, architecture, blocks=aligned, wide=options)
            constants = _constants(tile, dtype, aligned, options)
            name = f"tiles {word}{' options' if options else ''}"
            yield _variant(name, _tiles, word, constants, tile.num_warps, tile.num_stages)
            if word != "fp32":
                constants |= {"E": None}
                yield _variant(f"{name} sums", _tiles, word, constants, tile.num_warps, tile.num_stages)
        tile = _tile(dtype, architecture, blocks=False, wide=True)
        constants = _constants(tile, dtype, False, True)
        if aligned and word == "bf16":
            name = "tiles bf16 options pointers"
            yield _variant(name, _tiles, word, constants, tile.num_warps, tile.num_stages)
        if word != "fp16":
            target = constants | {"M": tile.target_rows}
            yield _variant(f"target {word}", _target_logits, word, target, 4, tile.num_stages)
        if word != "fp32":
            yield _variant(f"fold {word}", _fold, word, constants, 4, 3)
            yield _variant(f"rescale {word}", _rescale, word, constants, 4, 3)


def _constants(tile: LogitTile, dtype: torch.dtype, blocks: bool, options: bool) -> dict[str, Any]:
    sizes = {"M": tile.M, "N": tile.N, "K": tile.K, "STRIP": tile.strip, "A_STEP": 16, "ROWS": ROWS, "STRIPS": STRIPS}
    flags = {"BLOCKS": blocks, "STORE_BLOCKS": blocks}
    flags |= {"SOFTCAP": options, "STATS": options, "NEGATIVE": False, "NORMALISE": dtype == torch.float16}
    types = {"DTYPE": _LANGUAGE_DTYPES[dtype], "PRECISION": dot_precision(dtype)}
    absent = {} if options else dict.fromkeys(("bias", "u", "B", "stats"))
    return sizes | flags | types | absent


def _variant(name: str, kernel: Any, word: str, constants: dict[str, Any], num_warps: int, num_stages: int) -> Variant:
    """The kernel for matrices of the dtype `word`, whose rows are aligned, with what it takes of `constants`."""
    from ttpa_kernels.ahead import Variant

    types = dict.fromkeys(("hidden", "weight", "bias", "u", "B", "E"), f"*{word}")
    types |= dict.fromkeys(("at_target", "partials", "logp", "factor", "shift", "stats"), "*fp32")
    types |= {"target": "*i64"} | dict.fromkeys(("H", "hidden_stride", "weight_stride", "E_stride"), "i32")
    aligned = tuple(types)
    types |= dict.fromkeys(("R", "V", "A", "T", "group"), "i32")
    types |= dict.fromkeys(("inner", "outer", "outside", "reach", "gain"), "fp32")
    if constants.get("BLOCKS"):
        M, N, K = (constants[size] for size in "MNK")
        types |= {"hidden": f"tensordesc<{word}[{M},{K}]>", "weight": f"tensordesc<{word}[{N},{K}]>"}
        types |= {"E": f"tensordesc<{word}[{M},{constants['STRIP']}]>"}
    names = kernel.arg_names
    signature = {name: types[name] for name in names if name in types and name not in constants}
    pointers = tuple(name for name in aligned if name in signature and not signature[name].startswith("tensordesc"))
    fixed = {name: value for name, value in constants.items() if name in names}
    return Variant(f"linear_logp {name}", kernel, signature, fixed, num_warps, num_stages, pointers)
