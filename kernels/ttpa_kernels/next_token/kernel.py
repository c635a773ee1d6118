"""Triton kernels of `next_token`: parts of the vocabulary reduced to partial results, and these joined row by row.

B decode rows, H hidden size, V vocabulary, P parts of the vocabulary, K kept tokens (a power of two). A token and its
value are one int64 that sorts by value, then by the lower id: the value's bits in order, above the inverted id.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ttpa_kernels.configs import NEXT_TOKEN, NEXT_TOKEN_SPAN, SpanTile, Tile
from ttpa_kernels.engine import architecture, descriptors_fit
from ttpa_kernels.linear_logp.chunks import Head
from ttpa_kernels.linear_logp.kernel import _tanh
from ttpa_kernels.numerics import operand, product

if TYPE_CHECKING:
    from ttpa_kernels.ahead import Variant
    from ttpa_kernels.next_token.op import Results

FUSED_ROWS = 64  # rows up to which one kernel multiplies and reduces
BUFFER_ROWS = 256  # rows that share a pass over the head otherwise
BUFFER_BYTES = 16 << 20  # of a chunk's logits: stays in the L2 cache
JOINED = 1024  # kept tokens of all parts that are sorted together

LOWEST = tl.constexpr(-1e30)  # a maximum of -inf would make its differences NaN
VANISHED = tl.constexpr(-1e4)  # `x^2 exp(x)` is 0 from here on down
NOTHING = tl.constexpr(-(2**63))  # sorts after every token; its value is NaN
UNBEATEN = tl.constexpr(0x7F800000 << 32)  # its value is inf
LARGEST = tl.constexpr(1 - 2.0**-24)


@triton.jit
def _packed(x, ids, V):
    """Tokens `ids < V` and their values as sortable int64; NOTHING beyond."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(ids < V, (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64), NOTHING)


@triton.jit
def _value(packed):
    ordered = (packed >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _id(packed):
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _merged(a, b):
    """The K largest of two descending lists of K, in order."""
    return tl.bitonic_merge(tl.maximum(a, tl.flip(b, 1)), descending=True)


@triton.jit
def _unit(word):
    """(0, 1) as `noise.unit` has it."""
    return tl.minimum(word.to(tl.float32) * 2.0**-32 + 2.0**-33, LARGEST)


@triton.jit
def _units(keys, first, N: tl.constexpr):
    """v of `noise.gumbel` for N tokens from `first` on, a multiple of 4, and each of `keys [B, 1]`."""
    quads = (first // 4 + tl.arange(0, N // 4)).to(tl.uint32)[None, :]
    quads = tl.broadcast_to(quads, (keys.shape[0], N // 4))
    a, b, c, d = tl.philox(keys, quads, quads * 0, quads * 0, quads * 0)
    return _unit(tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (keys.shape[0], N)))


@triton.jit
def _gumbel(v):
    """`-log(-log(1 - v))`; the factor makes up for the rounding of `1 - v`."""
    rest = 1.0 - v
    exponential = tl.where(rest == 1.0, v, -tl.log(rest) * (v / (1.0 - rest)))
    return -tl.log(exponential)


@triton.jit
def _logits(x, bias, ids, V, inner, outer, SOFTCAP: tl.constexpr):
    """`inner * (x + bias)`, or `outer * tanh` of it; -inf beyond the vocabulary."""
    if bias is not None:
        x += tl.load(bias + ids, mask=ids < V, other=0.0).to(tl.float32)[None, :]
    z = x * inner
    if SOFTCAP:
        z = _tanh(z) * outer
    return tl.where((ids < V)[None, :], z, float("-inf"))


@triton.jit
def _positive(total):
    """1 instead of a sum of 0, which is that of logits of -inf alone."""
    return tl.where(total == 0.0, 1.0, total)


@triton.jit
def _above(x, low):
    """The larger one, NaN where x is."""
    return tl.where(x < low, low, x)


@triton.jit
def _fold_moments(peak, total, mean, spread, z):
    """Take logits `z [B, N]` into the sums of `e^(z - peak)`, the mean of `z - peak`, and the sum of squares around it,
    so that nothing cancels (`online._joined`)."""
    z_peak = tl.maximum(tl.max(z, axis=1), LOWEST)
    d = _above(z - z_peak[:, None], VANISHED)
    e = tl.exp(d)
    z_total = tl.sum(e, axis=1)
    z_mean = tl.sum(e * d, axis=1) / _positive(z_total)
    d -= z_mean[:, None]
    z_spread = tl.sum(e * d * d, axis=1)

    new_peak = tl.maximum(peak, z_peak)
    shift, z_shift = _above(peak - new_peak, VANISHED), _above(z_peak - new_peak, VANISHED)
    factor, z_factor = tl.exp(shift), tl.exp(z_shift)
    left, right = total * factor, z_total * z_factor
    new_total = left + right
    mean, z_mean = mean + shift, z_mean + z_shift
    share, z_share = left / _positive(new_total), right / _positive(new_total)
    between = left * z_share * (z_mean - mean) * (z_mean - mean)
    return new_peak, new_total, share * mean + z_share * z_mean, spread * factor + z_spread * z_factor + between


@triton.jit
def _fold_draw(best, best_z, z, keys, first, ids, V):
    """Take N tokens into the largest of `z + noise` and its z.

    A token with v needs `v <= -log(1 - v) < e^(z - best)` to win, so most tiles spare the logarithms and the search.
    """
    v = _units(keys, first, z.shape[1])
    hopeless = v > 1.001 * tl.exp(z - _value(best)[:, None])
    if tl.min(tl.min(hopeless.to(tl.int32), axis=1), axis=0) == 0:
        noisy = _packed(z + _gumbel(v), ids[None, :], V)
        tile_best = tl.max(noisy, axis=1)
        tile_z = tl.sum(tl.where(noisy == tile_best[:, None], z, 0.0), axis=1)
        best_z = tl.where(tile_best > best, tile_z, best_z)
        best = tl.maximum(best, tile_best)
    return best, best_z


@triton.jit
def _store_part(
    moments, best_of, best_z_of, rows, B, part, P, peak, total, mean, spread, best, best_z, DRAW: tl.constexpr
):
    rows64 = rows.to(tl.int64)
    moment = moments + rows64 * 4 * P + part
    tl.store(moment, peak, mask=rows < B)
    tl.store(moment + P, total, mask=rows < B)
    tl.store(moment + 2 * P, mean, mask=rows < B)
    tl.store(moment + 3 * P, spread, mask=rows < B)
    if DRAW:
        at = rows64 * P + part
        tl.store(best_of + at, best, mask=rows < B)
        tl.store(best_z_of + at, best_z, mask=rows < B)


@triton.jit
def _tiles_kernel(
    hidden,
    weight,
    bias,
    key,
    moments,
    best_of,
    best_z_of,
    top_of,
    B,
    V,
    H,
    P,
    tiles,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP: tl.constexpr,
):
    """All rows times `tiles` tiles of N tokens, reduced to one part of the partial results.

    In: `hidden [B, H]` with B <= M and `weight [V, H]` as descriptors of [M, K] and [N, K] or as pointers, `bias [V]`
    or None, `key [B]` int64 or None. Out: `moments [B, 4, P]` fp32, with keys `best_of [B, P]` int64 and
    `best_z_of [B, P]`, with TOP > 0 `top_of [B, TOP, P]` int64, descending.
    Grid: P programs, each with its own tiles.
    """
    part = tl.program_id(0)
    rows = tl.arange(0, M)
    peak = tl.full([M], LOWEST, tl.float32)
    total, mean, spread = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    best, best_z = tl.where(rows < B, NOTHING, UNBEATEN), tl.zeros([M], tl.float32)
    if key is not None:
        keys = tl.load(key + rows, mask=rows < B, other=0)[:, None]
    if TOP > 0:
        top = tl.full([M, TOP], NOTHING, tl.int64)
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(V, N))):
        ids = tile * N + tl.arange(0, N)
        x = tl.zeros([M, N], tl.float32)
        for start in range(0, H, K):
            if DESCRIPTORS:
                w = weight.load([tile * N, start])
                h = hidden.load([0, start])
            else:
                inside = start + tl.arange(0, K)
                w_mask = (ids < V)[:, None] & (inside < H)[None, :]
                h_mask = (rows < B)[:, None] & (inside < H)[None, :]
                w = tl.load(weight + ids.to(tl.int64)[:, None] * H + inside[None, :], mask=w_mask, other=0.0)
                h = tl.load(hidden + rows[:, None] * H + inside[None, :], mask=h_mask, other=0.0)
            x = tl.dot(h, w.T, x)
        z = _logits(x, bias, ids, V, inner, outer, SOFTCAP)
        peak, total, mean, spread = _fold_moments(peak, total, mean, spread, z)
        if key is not None:
            best, best_z = _fold_draw(best, best_z, z, keys, tile * N, ids, V)
        if TOP > 0:
            top = _merged(top, tl.topk(_packed(z, ids[None, :], V), TOP))
    _store_part(
        moments, best_of, best_z_of, rows, B, part, P, peak, total, mean, spread, best, best_z, DRAW=key is not None
    )
    if TOP > 0:
        at = (rows[:, None] * TOP + tl.arange(0, TOP)[None, :]) * P + part
        tl.store(top_of + at, top, mask=(rows < B)[:, None])


@triton.jit
def _spans_kernel(
    x_BC,
    bias,
    key,
    moments,
    best_of,
    best_z_of,
    top_of,
    B,
    first,
    end,
    P,
    first_part,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    N: tl.constexpr,
    STEPS: tl.constexpr,
    TOP: tl.constexpr,
):
    """One row and `N * STEPS` tokens of a chunk of products, reduced to one part of the partial results.

    In: `x_BC [B, end - first]` fp32, `bias [V]` or None, `key [B]` or None. Out: as `_tiles_kernel`, from `first_part`
    on. Grid: (spans, B). Lane n of the first pass keeps the largest of the tokens n, n + N, n + 2 N, ...: a token of
    the TOP largest lies in one of the TOP lanes with the largest maxima, so only these are looked at again and sorted.
    """
    row, span = tl.program_id(1), first + tl.program_id(0) * (N * STEPS)
    rows = row + tl.arange(0, 1)
    x_row = x_BC + row.to(tl.int64) * (end - first) - first
    peak = tl.full([1], LOWEST, tl.float32)
    total, mean, spread = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
    best, best_z = tl.full([1], NOTHING, tl.int64), tl.zeros([1], tl.float32)
    if key is not None:
        keys = tl.load(key + rows)[:, None]
    if TOP > 0:
        lanes = tl.full([1, N], NOTHING, tl.int64)
    for start in range(span, tl.minimum(span + N * STEPS, end), N):
        ids = start + tl.arange(0, N)
        x = tl.load(x_row + ids, mask=ids < end, other=0.0)
        z = _logits(x[None, :], bias, ids, end, inner, outer, SOFTCAP)
        peak, total, mean, spread = _fold_moments(peak, total, mean, spread, z)
        if key is not None:
            best, best_z = _fold_draw(best, best_z, z, keys, start, ids, end)
        if TOP > 0:
            lanes = tl.maximum(lanes, _packed(z, ids[None, :], end))
    part = first_part + tl.program_id(0)
    _store_part(
        moments, best_of, best_z_of, rows, B, part, P, peak, total, mean, spread, best, best_z, DRAW=key is not None
    )
    if TOP > 0:
        kept = tl.topk(lanes, TOP)
        lane = tl.where(kept == NOTHING, N * STEPS, (_id(kept) - span) % N)
        ids = tl.reshape(span + lane[:, :, None] + N * tl.arange(0, STEPS)[None, None, :], (TOP * STEPS,))
        ids = tl.where(ids < span + N * STEPS, ids, end)
        x = tl.load(x_row + ids, mask=ids < end, other=0.0)
        z = _logits(x[None, :], bias, ids, end, inner, outer, SOFTCAP)
        top = tl.topk(_packed(z, ids[None, :], end), TOP)
        at = (row.to(tl.int64) * TOP + tl.arange(0, TOP)[None, :]) * P + part
        tl.store(top_of + at, top)


@triton.jit
def _join_kernel(
    moments,
    best_of,
    best_z_of,
    top_of,
    lse,
    entropy,
    varentropy,
    top_logit,
    top_id,
    draw,
    draw_logp,
    P,
    NUM_TOP: tl.constexpr,
    TOP: tl.constexpr,
    PARTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """The results of one row from its P <= PARTS parts.

    In: as `_tiles_kernel` writes them. Out: `lse, entropy, varentropy [B]` fp32, `top_logit [B, NUM_TOP]` and int64
    `top_id`, with keys int64 `draw [B]` and `draw_logp`. Grid: B programs. The parts' lists are read RANKS ranks at a
    time, all parts together: where a block of ranks holds no token of the TOP largest so far, no later one does.
    """
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    inside = parts < P
    moment = moments + row * 4 * P + parts
    peaks = tl.load(moment, mask=inside, other=LOWEST)
    totals = tl.load(moment + P, mask=inside, other=0.0)
    means = tl.load(moment + 2 * P, mask=inside, other=0.0)
    spreads = tl.load(moment + 3 * P, mask=inside, other=0.0)
    peak = tl.max(peaks, axis=0)
    shifts = _above(peaks - peak, VANISHED)
    factors = tl.exp(shifts)
    weights = totals * factors
    total = tl.sum(weights, axis=0)
    mean = tl.sum(weights * (means + shifts), axis=0) / total
    off = means + shifts - mean
    spread = tl.sum(spreads * factors + weights * off * off, axis=0)
    log_total = tl.log(total)
    tl.store(lse + row, peak + log_total)
    tl.store(entropy + row, log_total - mean)
    tl.store(varentropy + row, spread / total)
    if draw is not None:
        at = row * P + parts
        bests = tl.load(best_of + at, mask=inside, other=NOTHING)
        best = tl.max(bests, axis=0)
        best_z = tl.sum(tl.where(bests == best, tl.load(best_z_of + at, mask=inside, other=0.0), 0.0), axis=0)
        tl.store(draw + row, _id(best).to(tl.int64))
        logp = best_z - (peak + log_total)
        tl.store(draw_logp + row, tl.where(logp > 0.0, 0.0, logp))
    if TOP > 0:
        top = tl.full([1, TOP], NOTHING, tl.int64)
        rank = 0
        while rank < TOP:
            ranks = rank + tl.arange(0, RANKS)
            block = tl.load(
                top_of + (row * TOP + ranks[:, None]) * P + parts[None, :],
                mask=(ranks < TOP)[:, None] & inside[None, :],
                other=NOTHING,
            )
            block = tl.reshape(block, (1, RANKS * PARTS))
            if tl.max(tl.max(block, axis=1), axis=0) > tl.min(tl.min(top, axis=1), axis=0):
                top = _merged(top, tl.topk(block, TOP))
                rank += RANKS
            else:
                rank = TOP
        kept = tl.arange(0, TOP)[None, :]
        tl.store(top_logit + row * NUM_TOP + kept, _value(top), mask=kept < NUM_TOP)
        tl.store(top_id + row * NUM_TOP + kept, _id(top).to(tl.int64), mask=kept < NUM_TOP)


@triton.jit
def _uniform_kernel(key, out, B, N: tl.constexpr):
    """`noise.uniform`: `out [B]` fp32 from `key [B]` int64. Grid: B / N programs."""
    rows = tl.program_id(0) * N + tl.arange(0, N)
    zero = tl.zeros([N], tl.uint32)
    word, _, _, _ = tl.philox(tl.load(key + rows, mask=rows < B, other=0), zero, zero + 1, zero, zero)
    tl.store(out + rows, _unit(word), mask=rows < B)


def next_token(
    head: Head,
    hidden_BH: torch.Tensor,
    *,
    num_top: int,
    key_B: torch.Tensor | None,
    tile: Tile | None = None,
    span: SpanTile = NEXT_TOKEN_SPAN,
) -> Results:
    """The fields of `NextToken`; draws are empty without keys."""
    B, device = len(hidden_BH), hidden_BH.device
    hidden_BH, head = hidden_BH.contiguous(), head._replace(weight_VH=head.weight_VH.contiguous())
    lse_B, entropy_B, varentropy_B = (torch.empty(B, dtype=torch.float32, device=device) for _ in range(3))
    top_logit_BK = torch.empty(B, num_top, dtype=torch.float32, device=device)
    top_id_BK = torch.empty(B, num_top, dtype=torch.int64, device=device)
    draws = 0 if key_B is None else B
    draw_B = torch.empty(draws, dtype=torch.int64, device=device)
    draw_logp_B = torch.empty(draws, dtype=torch.float32, device=device)
    top = max(2, triton.next_power_of_2(num_top)) if num_top else 0
    fused = B <= FUSED_ROWS and hidden_BH.dtype != torch.float32
    for start in range(0, B, BUFFER_ROWS):
        rows = slice(start, start + BUFFER_ROWS)
        keys = None if key_B is None else key_B[rows]
        if fused:
            parts = _tile_parts(head, hidden_BH[rows], keys, top, tile or _tile(B, device))
        else:
            parts = _span_parts(head, hidden_BH[rows], keys, top, span)
        P = parts[0].shape[-1]
        width = triton.next_power_of_2(P)
        _join_kernel[(len(parts[0]),)](
            *parts,
            lse_B[rows],
            entropy_B[rows],
            varentropy_B[rows],
            top_logit_BK[rows],
            top_id_BK[rows],
            None if keys is None else draw_B[rows],
            None if keys is None else draw_logp_B[rows],
            P,
            NUM_TOP=num_top,
            TOP=top,
            PARTS=width,
            RANKS=_ranks(top, width),
            num_warps=4,
        )
    return lse_B, entropy_B, varentropy_B, top_logit_BK, top_id_BK, draw_B, draw_logp_B


def uniform(key_B: torch.Tensor) -> torch.Tensor:
    """`noise.uniform`."""
    out_B = torch.empty(len(key_B), dtype=torch.float32, device=key_B.device)
    if len(key_B):
        _uniform_kernel[(triton.cdiv(len(key_B), 128),)](key_B, out_B, len(key_B), N=128, num_warps=4)
    return out_B


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # moments, best, its z, top


def _tile_parts(head: Head, hidden_BH: torch.Tensor, key_B: torch.Tensor | None, top: int, tile: Tile) -> Parts:
    (B, H), V, device = hidden_BH.shape, len(head.weight_VH), hidden_BH.device
    num_tiles = triton.cdiv(V, tile.N)
    tiles = triton.cdiv(num_tiles, _programs(tile, device))
    P = triton.cdiv(num_tiles, tiles)
    parts = _empty_parts(B, P, top, device)
    matrices: list[Any] = [hidden_BH, head.weight_VH]
    if descriptors := descriptors_fit(hidden_BH, head.weight_VH):
        blocks = ([tile.M, tile.K], [tile.N, tile.K])
        matrices = [TensorDescriptor.from_tensor(m, block) for m, block in zip(matrices, blocks, strict=True)]
    inner, outer = _factors(head)
    _tiles_kernel[(P,)](
        *matrices,
        head.bias_V,
        key_B,
        *parts,
        B,
        V,
        H,
        P,
        tiles,
        inner,
        outer,
        SOFTCAP=head.softcap is not None,
        DESCRIPTORS=descriptors,
        M=tile.M,
        N=tile.N,
        K=tile.K,
        TOP=top,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return parts


def _span_parts(head: Head, hidden_BH: torch.Tensor, key_B: torch.Tensor | None, top: int, span: SpanTile) -> Parts:
    B, V, device = len(hidden_BH), len(head.weight_VH), hidden_BH.device
    width = span.N * span.steps
    chunk = min(max(1, BUFFER_BYTES // (4 * B * width)), triton.cdiv(V, width)) * width
    P = triton.cdiv(V, width)
    parts = _empty_parts(B, P, top, device)
    buffer = torch.empty(B * min(chunk, V), dtype=torch.float32, device=device)
    inner, outer = _factors(head)
    for first in range(0, V, chunk):
        end = min(first + chunk, V)
        x_BC = buffer[: B * (end - first)].view(B, end - first)
        product(operand(hidden_BH), operand(head.weight_VH[first:end]).T, out=x_BC)
        _spans_kernel[(triton.cdiv(end - first, width), B)](
            x_BC,
            head.bias_V,
            key_B,
            *parts,
            B,
            first,
            end,
            P,
            first // width,
            inner,
            outer,
            SOFTCAP=head.softcap is not None,
            N=span.N,
            STEPS=span.steps,
            TOP=top,
            num_warps=span.num_warps,
        )
    return parts


def _empty_parts(B: int, P: int, top: int, device: torch.device) -> Parts:
    moments = torch.empty(B, 4, P, dtype=torch.float32, device=device)
    best = torch.empty(B, P, dtype=torch.int64, device=device)
    best_z = torch.empty(B, P, dtype=torch.float32, device=device)
    return moments, best, best_z, torch.empty(B, top, P, dtype=torch.int64, device=device)


def _factors(head: Head) -> tuple[float, float]:
    if head.softcap is None:
        return head.logit_scale / head.temperature, 1.0
    return head.logit_scale / head.softcap, head.softcap / head.temperature


def _programs(tile: Tile, device: torch.device) -> int:
    """As many as run at a time."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * (3 if tile.num_warps == 4 else 2)


def _tile(rows: int, device: torch.device) -> Tile:
    return next(tile for tile in NEXT_TOKEN[architecture(device)] if rows <= tile.M)


def _ranks(top: int, width: int) -> int:
    return min(top, max(1, JOINED // width))


def variants(arch: int) -> Iterator[Variant]:
    """The shipped kernels: all row tiles, with all options at once and with few, and what joins their results."""
    from ttpa_kernels.ahead import Variant

    partial = {"moments": "*fp32", "best_of": "*i64", "best_z_of": "*fp32", "top_of": "*i64"}
    numbers = {"P": "i32", "inner": "fp32", "outer": "fp32"}
    *smaller, largest = NEXT_TOKEN[arch]
    cases = [
        # dtype, tile, TOP, keys, bias and softcap, descriptors
        *(("bf16", tile, 32, True, False, arch >= 90) for tile in smaller),
        ("bf16", largest, 64, True, True, arch >= 90),
    ]
    if arch >= 90:
        cases.append(("fp16", largest, 0, False, False, False))
    for dtype, tile, top, draw, options, descriptors in cases:
        signature = partial | numbers | {"B": "i32", "V": "i32", "H": "i32", "tiles": "i32"}
        aligned = [*partial, "H"]
        constants: dict[str, Any] = {"SOFTCAP": options, "DESCRIPTORS": descriptors, "TOP": top}
        constants |= {"M": tile.M, "N": tile.N, "K": tile.K, "bias": None, "key": None}
        for argument, height in (("hidden", tile.M), ("weight", tile.N)):
            signature[argument] = f"tensordesc<{dtype}[{height},{tile.K}]>" if descriptors else f"*{dtype}"
            aligned += [] if descriptors else [argument]
        given = {"bias": f"*{dtype}"} if options else {}
        given |= {"key": "*i64"} if draw else {}
        name = f"next_token tiles {dtype} rows {tile.M} top {top}{' bias softcap' if options else ''}"
        yield Variant(
            name, _tiles_kernel, signature | given, constants, tile.num_warps, tile.num_stages, (*aligned, *given)
        )
    span = NEXT_TOKEN_SPAN
    signature = partial | numbers | dict.fromkeys(("B", "first", "end", "first_part"), "i32")
    signature |= {"x_BC": "*fp32", "bias": "*bf16", "key": "*i64"}
    constants = {"SOFTCAP": True, "N": span.N, "STEPS": span.steps, "TOP": 32}
    aligned = [*partial, "x_BC", "bias", "key", "first"]
    yield Variant(
        "next_token spans top 32 bias softcap", _spans_kernel, signature, constants, span.num_warps, 3, tuple(aligned)
    )
    results = dict.fromkeys(("lse", "entropy", "varentropy", "top_logit", "draw_logp"), "*fp32")
    results |= {"top_id": "*i64", "draw": "*i64"}
    constants = {"NUM_TOP": 64, "TOP": 64, "PARTS": 512, "RANKS": _ranks(64, 512)}
    signature = partial | results | {"P": "i32"}
    yield Variant("next_token join top 64", _join_kernel, signature, constants, 4, 3, tuple(partial | results))
    signature = {"key": "*i64", "out": "*fp32", "B": "i32"}
    yield Variant("next_token uniform", _uniform_kernel, signature, {"N": 128}, 4, 3, ("key", "out"))
