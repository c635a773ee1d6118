"""Triton kernels of `linear_kl`: statistics of strips of the two logit matrices, their fold, and the gradient's matrix.

C rows of a chunk, H hidden size, V vocabulary, T strips of the vocabulary, each half a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ttpa_kernels.configs import LINEAR_KL, LINEAR_KL_FP16, LINEAR_KL_FP32, Tile
from ttpa_kernels.engine import architecture, descriptors_fit

if TYPE_CHECKING:
    from ttpa_kernels.ahead import Variant
    from ttpa_kernels.linear_kl.chunks import Heads

ROWS = 32  # rows of a program of the fold
STRIPS = 32  # strips that it takes at a time
COMBINE_ROWS = 64
LN_2 = tl.constexpr(math.log(2.0))
GROUP = 16  # row tiles that share a tile of W


@triton.jit
def _curve(d):
    """`e^d - 1 - d` for |d| < 1/2, without the cancellation of its terms."""
    p = 1.0 / 5040 + d * (1.0 / 40320)
    p = 1.0 / 120 + d * (1.0 / 720 + d * p)
    return d * d * (1.0 / 2 + d * (1.0 / 6 + d * (1.0 / 24 + d * p)))


@triton.jit
def _tanh(x):
    """By `m = e^(-2|x|) - 1`, which is exact to the last bits also where x is small."""
    y = -2.0 * tl.abs(x)
    m = tl.where(y > -0.5, y + _curve(y), tl.exp(y) - 1.0)
    return tl.where(x < 0.0, m, -m) / (2.0 + m)


@triton.jit
def _logits(product, bias, columns, V, inner, outer, SOFTCAP: tl.constexpr):
    """`inner * (product + bias)`, or `outer * tanh` of it; -inf beyond the vocabulary."""
    if bias is not None:
        product += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    z = product * inner
    if SOFTCAP:
        z = _tanh(z) * outer
    return tl.where((columns < V)[None, :], z, float("-inf"))


@triton.jit
def _log_sum(z):
    """Maximum and `log sum e^(z - maximum)` of each row; -inf (and a maximum of 0) where all of it is -inf."""
    top = tl.max(z, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.log(tl.sum(tl.exp(z - top[:, None]), axis=1))


@triton.jit
def _halves(x):
    """The left and the right half of the columns."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()


@triton.jit
def _reduce_strip(
    x,
    ref_x,
    row_tile,
    strip,
    bias,
    ref_bias,
    parts,
    difference,
    probability,
    C,
    V,
    stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Write what `_tiles_kernel` says of the products `x` and `ref_x` [M, N] of one strip of the vocabulary.

    `KL = sum p_ref (r - 1 - log r)` with `r = p / p_ref`: every term is at least 0 and of second order in `log r`, so
    nothing cancels where the distributions are close, and an error of the log-sum-exps counts with its square.
    """
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    rows = row_tile * M + tl.arange(0, M)
    columns = strip * N + tl.arange(0, N)
    z = _logits(x, bias, columns, V, inner, outer, SOFTCAP)
    ref_z = _logits(ref_x, ref_bias, columns, V, inner, outer, SOFTCAP)
    top, log_sum = _log_sum(z)
    ref_top, ref_log_sum = _log_sum(ref_z)
    some, ref_some = log_sum > float("-inf"), ref_log_sum > float("-inf")
    # The log-ratio from logits where the two sums are close, else from logits less their maxima: each has small terms.
    shift = (top - ref_top) + (log_sum - ref_log_sum)
    close = tl.abs(shift) < 1.0
    z_from, ref_z_from = tl.where(close, 0.0, top), tl.where(close, 0.0, ref_top)
    shift = tl.where(close, shift, tl.where(some & ref_some, log_sum - ref_log_sum, 0.0))
    d = ((z - z_from[:, None]) - (ref_z - ref_z_from[:, None])) - shift[:, None]
    # The scale goes into the exponents, where it costs nothing.
    p = tl.exp(z - (tl.where(some, top + log_sum, 0.0) - LN_2 * LOG2_SCALE)[:, None])
    ref_p = tl.exp(ref_z - (tl.where(ref_some, ref_top + ref_log_sum, 0.0) - LN_2 * LOG2_SCALE)[:, None])
    near = tl.abs(d) < 0.5
    curve = ref_p * _curve(d)
    delta = tl.where(near, ref_p * d + curve, p - ref_p)
    kl = tl.where(near, curve, tl.where(ref_p == 0.0, p, delta - ref_p * d))

    part = parts + strip.to(tl.int64) * 5 * C + rows
    tl.store(part, tl.where(ref_some, ref_top, float("-inf")), mask=rows < C)
    tl.store(part + C, ref_log_sum, mask=rows < C)
    tl.store(part + 2 * C, tl.where(some, top, float("-inf")), mask=rows < C)
    tl.store(part + 3 * C, log_sum, mask=rows < C)
    tl.store(part + 4 * C, tl.sum(kl, axis=1) * 2.0**-LOG2_SCALE, mask=rows < C)
    if difference is not None:
        if SOFTCAP:
            t = z / outer
            slope = 1.0 - t * t
            delta *= slope
            ref_p *= slope
        if DESCRIPTORS:
            difference.store([row_tile * M, strip * N], delta.to(difference.dtype))
            probability.store([row_tile * M, strip * N], ref_p.to(probability.dtype))
        else:
            offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
            mask = (rows < C)[:, None] & (columns < V)[None, :]
            tl.store(difference + offsets, delta.to(difference.dtype.element_ty), mask=mask)
            tl.store(probability + offsets, ref_p.to(probability.dtype.element_ty), mask=mask)


@triton.jit
def _tiles_kernel(
    hidden,
    ref_hidden,
    weight,
    ref_weight,
    bias,
    ref_bias,
    parts,
    difference,
    probability,
    C,
    V,
    H,
    stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile [M rows, N tokens] of both logit matrices, as two strips of N / 2 tokens, reduced to what is needed.

    Inputs: `hidden, ref_hidden [C, H]`, `weight, ref_weight [V, H]` (None: shared), `bias, ref_bias [V]` or None; the
    matrices as descriptors of [M, K] and [N, K] or as pointers. Outputs: `parts [T, 5, C]` fp32, for each strip and
    row the maximum and the log of the sum of exponentials relative to it, of reference and policy, and the divergence
    of the two within the strip; with a gradient, times 2^LOG2_SCALE and the slope of the softcap, `difference [C, V]`,
    policy minus reference probability within the strip, and `probability [C, V]`, the reference's.
    Grid: row tiles times vocabulary tiles; GROUP row tiles take a vocabulary tile one after the other, so that W is
    read from memory once for GROUP * M rows and their hidden states stay in the L2 cache.
    """
    row_tiles, column_tiles = tl.cdiv(C, M), tl.cdiv(V, N)
    program = tl.program_id(0)
    group = program // (GROUP * column_tiles)
    group_size = tl.minimum(row_tiles - group * GROUP, GROUP)
    row_tile = group * GROUP + program % (GROUP * column_tiles) % group_size
    column_tile = program % (GROUP * column_tiles) // group_size
    rows = row_tile * M + tl.arange(0, M)
    columns = column_tile * N + tl.arange(0, N)

    x = tl.zeros([M, N], dtype=tl.float32)
    ref_x = tl.zeros([M, N], dtype=tl.float32)
    rows64, columns64 = rows.to(tl.int64), columns.to(tl.int64)
    for start in range(0, H, K):
        if DESCRIPTORS:
            h = hidden.load([row_tile * M, start])
            ref_h = ref_hidden.load([row_tile * M, start])
            w = weight.load([column_tile * N, start])
            ref_w = w
            if ref_weight is not None:
                ref_w = ref_weight.load([column_tile * N, start])
        else:
            inside = start + tl.arange(0, K)
            row_mask = (rows < C)[:, None] & (inside < H)[None, :]
            column_mask = (columns < V)[:, None] & (inside < H)[None, :]
            row_offsets = rows64[:, None] * H + inside[None, :]
            column_offsets = columns64[:, None] * H + inside[None, :]
            h = tl.load(hidden + row_offsets, mask=row_mask, other=0.0)
            ref_h = tl.load(ref_hidden + row_offsets, mask=row_mask, other=0.0)
            w = tl.load(weight + column_offsets, mask=column_mask, other=0.0)
            ref_w = w
            if ref_weight is not None:
                ref_w = tl.load(ref_weight + column_offsets, mask=column_mask, other=0.0)
        x = tl.dot(h, w.T, x, input_precision="ieee")
        ref_x = tl.dot(ref_h, ref_w.T, ref_x, input_precision="ieee")

    # One half after the other, because the steps on both would not fit in the registers that the products leave.
    left, right = _halves(x)
    ref_left, ref_right = _halves(ref_x)
    for half in tl.static_range(2):
        _reduce_strip(
            left if half == 0 else right,
            ref_left if half == 0 else ref_right,
            row_tile,
            2 * column_tile + half,
            bias,
            ref_bias,
            parts,
            difference,
            probability,
            C,
            V,
            stride,
            inner,
            outer,
            SOFTCAP,
            LOG2_SCALE,
            DESCRIPTORS,
        )


@triton.jit
def _fold_sum(top, total, strip_top, log_sum):
    """Take strips [STRIPS, ROWS] into the maximum of each row and the sum of exponentials relative to it."""
    new_top = tl.maximum(top, tl.max(strip_top, axis=0))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    return new_top, total * tl.exp(top - safe) + tl.sum(tl.exp((strip_top - safe[None, :]) + log_sum), axis=0)


@triton.jit
def _fold_kernel(parts, kl, C, T, GRADIENT: tl.constexpr, ROWS: tl.constexpr, STRIPS: tl.constexpr):
    """The divergences `kl [C]` from `parts [T, 5, C]`, by the chain rule: between the strips plus within them.

    With a gradient the first two parts are replaced by the factors a and b of `a * difference + b * probability`,
    which is policy minus reference probability: the strip's policy mass, and its excess over the reference's.
    Grid: one program for ROWS rows.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    ref_top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    ref_total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, T, STRIPS):
        strips = start + tl.arange(0, STRIPS)
        mask = (strips < T)[:, None] & (rows < C)[None, :]
        part = parts + strips.to(tl.int64)[:, None] * 5 * C + rows[None, :]
        strip_top = tl.load(part, mask=mask, other=float("-inf"))
        ref_top, ref_total = _fold_sum(ref_top, ref_total, strip_top, tl.load(part + C, mask=mask, other=0.0))
        strip_top = tl.load(part + 2 * C, mask=mask, other=float("-inf"))
        top, total = _fold_sum(top, total, strip_top, tl.load(part + 3 * C, mask=mask, other=0.0))
    log_sum, ref_log_sum = tl.log(total), tl.log(ref_total)
    shift = (top - ref_top) + (log_sum - ref_log_sum)
    result = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, T, STRIPS):
        strips = start + tl.arange(0, STRIPS)
        mask = (strips < T)[:, None] & (rows < C)[None, :]
        part = parts + strips.to(tl.int64)[:, None] * 5 * C + rows[None, :]
        ref_x = tl.load(part, mask=mask, other=float("-inf"))
        ref_y = tl.load(part + C, mask=mask, other=0.0)
        x = tl.load(part + 2 * C, mask=mask, other=float("-inf"))
        y = tl.load(part + 3 * C, mask=mask, other=0.0)
        within = tl.load(part + 4 * C, mask=mask, other=0.0)
        strip_shift = (x - ref_x) + (y - ref_y)
        log_mass = (x - top[None, :]) + (y - log_sum[None, :])
        ref_log_mass = (ref_x - ref_top[None, :]) + (ref_y - ref_log_sum[None, :])
        mass, ref_mass = tl.exp(log_mass), tl.exp(ref_log_mass)
        d = tl.where((tl.abs(shift) < 1.0)[None, :], strip_shift - shift[None, :], log_mass - ref_log_mass)
        near = tl.abs(d) < 0.5
        curve = ref_mass * _curve(d)
        excess = tl.where(near, ref_mass * d + curve, mass - ref_mass)
        between = tl.where(near, curve, excess - ref_mass * d)
        result += tl.sum(tl.where(ref_mass == 0.0, mass, between + ref_mass * within), axis=0)
        if GRADIENT:
            tl.store(part, mass, mask=mask)
            tl.store(part + C, excess, mask=mask)
    tl.store(kl + rows, result, mask=rows < C)


@triton.jit
def _combine_kernel(difference, probability, parts, C, V, stride, M: tl.constexpr, N: tl.constexpr):
    """In place `difference = a * difference + b * probability [C, V]`, with the factors that the fold left in `parts`.

    Grid: (strips of N tokens, blocks of M rows).
    """
    rows = tl.program_id(1) * M + tl.arange(0, M)
    columns = tl.program_id(0) * N + tl.arange(0, N)
    part = parts + tl.program_id(0).to(tl.int64) * 5 * C + rows
    a = tl.load(part, mask=rows < C)[:, None]
    b = tl.load(part + C, mask=rows < C)[:, None]
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = (rows < C)[:, None] & (columns < V)[None, :]
    d = tl.load(difference + offsets, mask=mask).to(tl.float32)
    p = tl.load(probability + offsets, mask=mask).to(tl.float32)
    tl.store(difference + offsets, (a * d + b * p).to(difference.dtype.element_ty), mask=mask)


def parts_bytes(vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Workspace of one row beside the two matrices of the gradient."""
    return 40 * triton.cdiv(vocab_size, _tile(dtype, architecture(device)).N)


def divergences(
    heads: Heads,
    hidden_CH: torch.Tensor,
    ref_hidden_CH: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float = 1.0,
    tile: Tile | None = None,
) -> torch.Tensor:
    """`kl_C`; the first of the two matrices `out [C, V]` becomes `scale (p - p_ref)` times the slope of the softcap.

    The second is overwritten; they may have gaps between rows, the inputs may not.
    """
    (C, H), V, device = hidden_CH.shape, len(heads.weight_VH), hidden_CH.device
    matrices = [hidden_CH, ref_hidden_CH, heads.weight_VH, heads.ref_weight_VH, *(out or (None, None))]
    present = [m for m in matrices if m is not None]
    assert all(m.is_contiguous() for m in matrices[:4] if m is not None)
    # fp32 tiles are multiplied by the general units, which want them spread over registers.
    descriptors = hidden_CH.dtype != torch.float32 and descriptors_fit(*present)
    tile = tile or _tile(hidden_CH.dtype, architecture(device) if descriptors else 80)
    stride = 0 if out is None else out[0].stride(0)
    T = 2 * triton.cdiv(V, tile.N)
    parts_TSC = torch.empty(T, 5, C, dtype=torch.float32, device=device)
    kl_C = torch.empty(C, dtype=torch.float32, device=device)
    arguments: list[Any] = matrices
    if descriptors:
        blocks = [[tile.M, tile.K]] * 2 + [[tile.N, tile.K]] * 2 + [[tile.M, tile.N // 2]] * 2
        arguments = [
            None if m is None else TensorDescriptor.from_tensor(m, block)
            for m, block in zip(matrices, blocks, strict=True)
        ]
    inner, outer = heads.logit_scale / heads.temperature, 1.0
    if heads.softcap is not None:
        inner, outer = heads.logit_scale / heads.softcap, heads.softcap / heads.temperature
    _tiles_kernel[(triton.cdiv(C, tile.M) * T // 2,)](
        *arguments[:4],
        heads.bias_V,
        heads.ref_bias_V,
        parts_TSC,
        *arguments[4:],
        C,
        V,
        H,
        stride,
        inner,
        outer,
        SOFTCAP=heads.softcap is not None,
        LOG2_SCALE=round(math.log2(scale)),
        DESCRIPTORS=descriptors,
        M=tile.M,
        N=tile.N,
        K=tile.K,
        GROUP=GROUP,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    _fold_kernel[(triton.cdiv(C, ROWS),)](
        parts_TSC, kl_C, C, T, GRADIENT=out is not None, ROWS=ROWS, STRIPS=STRIPS, num_warps=4
    )
    if out is not None:
        _combine_kernel[(T, triton.cdiv(C, COMBINE_ROWS))](
            *out, parts_TSC, C, V, stride, M=COMBINE_ROWS, N=tile.N // 2, num_warps=8
        )
    return kl_C


def _tile(dtype: torch.dtype, arch: int) -> Tile:
    """The row of the table; without descriptors, whose addresses take registers, that of sm_80."""
    return {torch.float32: LINEAR_KL_FP32, torch.float16: LINEAR_KL_FP16}.get(dtype, LINEAR_KL)[arch]


def variants(arch: int) -> Iterator[Variant]:
    """The shipped kernels: shared and separate heads, with and without the gradient, all options at once."""
    from ttpa_kernels.ahead import Variant

    cases = [
        # name, dtype, shared head, gradient, bias and softcap, descriptors
        ("bf16 shared", "bf16", True, True, False, arch >= 90),
        ("bf16", "bf16", False, True, False, arch >= 90),
        ("bf16 no gradient", "bf16", False, False, False, arch >= 90),
        ("bf16 bias softcap", "bf16", False, True, True, arch >= 90),
        ("fp16 shared", "fp16", True, True, False, arch >= 90),
        ("fp32", "fp32", False, True, True, False),
    ]
    if arch >= 90:
        cases.append(("bf16 pointers", "bf16", False, True, False, False))
    for name, dtype, shared, gradient, options, descriptors in cases:
        table = {"fp32": LINEAR_KL_FP32, "fp16": LINEAR_KL_FP16}.get(dtype, LINEAR_KL)
        tile = table[arch if descriptors else 80]
        signature, aligned = {"parts": "*fp32"}, ["parts"]
        constants: dict[str, Any] = {}
        for argument, block, present in (
            ("hidden", (tile.M, tile.K), True),
            ("ref_hidden", (tile.M, tile.K), True),
            ("weight", (tile.N, tile.K), True),
            ("ref_weight", (tile.N, tile.K), not shared),
            ("difference", (tile.M, tile.N // 2), gradient),
            ("probability", (tile.M, tile.N // 2), gradient),
        ):
            if not present:
                constants[argument] = None
            elif descriptors:
                signature[argument] = f"tensordesc<{dtype}[{block[0]},{block[1]}]>"
            else:
                signature[argument] = f"*{dtype}"
                aligned.append(argument)
        for argument in ("bias", "ref_bias"):
            if options:
                signature[argument] = f"*{dtype}"
                aligned.append(argument)
            else:
                constants[argument] = None
        signature |= dict.fromkeys(("C", "V", "H", "stride"), "i32") | dict.fromkeys(("inner", "outer"), "fp32")
        aligned += ["H", "stride"]
        constants |= {"SOFTCAP": options, "LOG2_SCALE": 14 if dtype == "fp16" else 0, "DESCRIPTORS": descriptors}
        constants |= {"M": tile.M, "N": tile.N, "K": tile.K, "GROUP": GROUP}
        yield Variant(
            f"linear_kl tiles {name}",
            _tiles_kernel,
            signature,
            constants,
            tile.num_warps,
            tile.num_stages,
            tuple(aligned),
        )
    signature = {"parts": "*fp32", "kl": "*fp32", "C": "i32", "T": "i32"}
    constants = {"GRADIENT": True, "ROWS": ROWS, "STRIPS": STRIPS}
    yield Variant("linear_kl fold", _fold_kernel, signature, constants, 4, 2, ("parts", "kl"))
    signature = {"difference": "*bf16", "probability": "*bf16", "parts": "*fp32"} | dict.fromkeys(
        ("C", "V", "stride"), "i32"
    )
    constants = {"M": COMBINE_ROWS, "N": LINEAR_KL[arch].N // 2}
    aligned_names = ("difference", "probability", "parts", "stride")
    yield Variant("linear_kl combine", _combine_kernel, signature, constants, 8, 2, aligned_names)
