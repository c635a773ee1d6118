"""The engine `triton`: online softmax over the visible blocks, and its gradients from recomputed probabilities.

Scores are kept in base 2: `S = scale log2(e) Q K^T`, `P = 2^(S - lse)`, with `lse_NT` the base-2 log-sum-exp of a row.
`lse_NT` and `delta_NT` reach to the end of the last of B blocks, where they are 0, so that their loads need no mask.
Every program walks along one row of the block lists: over its full blocks first, without a mask, then over the partial
ones. Heads of the same keys stand side by side in the grid, so that their keys are still in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ttpa_kernels.ahead import Variant
from ttpa_kernels.configs import TREE_ATTENTION, TREE_ATTENTION_FP32, Sweep
from ttpa_kernels.engine import architecture, descriptors_fit
from ttpa_kernels.numerics import dot_precision
from ttpa_kernels.tree_attention.blocks import BLOCK, BlockLists

LOG2_E = tl.constexpr(1.4426950408889634)
DELTA_ROWS = 16


@triton.jit
def _tile(
    source,  # pointer, or descriptor [heads, T, D] of tiles [1, ROWS, WIDTH]
    head,
    start,
    stride_head,
    stride_token,
    T,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tokens `start ...` of a head as `[ROWS, WIDTH]`, 0 beyond T and beyond D."""
    if TMA:
        tile = source.load([head, start, 0]).reshape(ROWS, WIDTH)
    else:
        row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        first = source + head.to(tl.int64) * stride_head + start.to(tl.int64) * stride_token
        inside = (start + row < T)[:, None]
        if D < WIDTH:
            inside = inside & (column < D)[None, :]
        tile = tl.load(first + row[:, None] * stride_token + column[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def _store_tile(
    target,
    tile,
    head,
    start,
    stride_head,
    stride_token,
    T,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    first = target + head.to(tl.int64) * stride_head + start.to(tl.int64) * stride_token
    inside = (start + row < T)[:, None] & (column < D)[None, :]
    tl.store(first + row[:, None] * stride_token + column[None, :], tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _step_start(listed, index, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """First token of step `index` of a walk: every listed block is `BLOCK / STEP` steps."""
    return tl.load(listed + index // (BLOCK // STEP)) * BLOCK + index % (BLOCK // STEP) * STEP


@triton.jit
def _forward(
    query,
    key,
    value,
    out,
    lse,
    end,
    keys_BB,
    num_keys_2B,
    query_head,
    query_token,
    key_head,
    key_token,
    value_head,
    value_token,
    out_head,
    out_token,
    T,
    num_blocks,
    group,
    scale_log2,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and log-sum-exp of a tile of queries of one head.

    In: query `[N, T, D]`, key and value `[G, T, D]`, end `[T]`, the key lists.
    Out: out `[N, T, D]`, lse `[N, B BLOCK]`.
    Grid: N times the query tiles; the last tiles of a head, which see most keys, come first.
    """
    tiles = num_blocks * (BLOCK // OWN)
    head = tl.program_id(0) // tiles
    start = (tiles - 1 - tl.program_id(0) % tiles) * OWN
    block = start // BLOCK
    listed = keys_BB + block.to(tl.int64) * num_blocks
    full = tl.load(num_keys_2B + block) * (BLOCK // STEP)
    visible = tl.load(num_keys_2B + num_blocks + block) * (BLOCK // STEP)
    q_MD = _tile(query, head, start, query_head, query_token, T, D, OWN, WIDTH, TMA)
    i_M = start + tl.arange(0, OWN)
    out_MD = tl.zeros((OWN, WIDTH), tl.float32)
    top_M = tl.full((OWN,), -float("inf"), tl.float32)
    total_M = tl.zeros((OWN,), tl.float32)
    for masked in tl.static_range(2):
        for index in range(full * masked, visible if masked else full):
            step = _step_start(listed, index, BLOCK, STEP)
            k_SD = _tile(key, head // group, step, key_head, key_token, T, D, STEP, WIDTH, TMA)
            score_MS = tl.dot(q_MD, k_SD.T, input_precision=PRECISION)
            if masked:
                j_S = step + tl.arange(0, STEP)
                end_S = tl.load(end + j_S, mask=j_S < T, other=0)
                score_MS = tl.where((j_S <= i_M[:, None]) & (i_M[:, None] < end_S), score_MS, -float("inf"))
            new_M = tl.maximum(top_M, tl.max(score_MS, 1) * scale_log2)
            # a row that has seen no key yet has the maximum -inf, which cannot be subtracted
            shift_M = tl.where(new_M == -float("inf"), 0.0, new_M) if masked else new_M
            p_MS = tl.exp2(score_MS * scale_log2 - shift_M[:, None])
            shrink_M = tl.exp2(top_M - shift_M)
            total_M = total_M * shrink_M + tl.sum(p_MS, 1)
            v_SD = _tile(value, head // group, step, value_head, value_token, T, D, STEP, WIDTH, TMA)
            out_MD = tl.dot(p_MS.to(v_SD.dtype), v_SD, out_MD * shrink_M[:, None], input_precision=PRECISION)
            top_M = new_M
    total_M = tl.where(i_M < T, total_M, 1.0)
    lse_M = tl.where(i_M < T, top_M + tl.log2(total_M), 0.0)
    _store_tile(out, out_MD / total_M[:, None], head, start, out_head, out_token, T, D, OWN, WIDTH)
    tl.store(lse + head.to(tl.int64) * num_blocks * BLOCK + i_M, lse_M)


@triton.jit
def _delta(
    out,
    grad,
    delta,
    out_head,
    out_token,
    grad_head,
    grad_token,
    T,
    num_blocks,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`delta[n, i] = sum_d grad[n, i, d] out[n, i, d]`, the mean that the softmax takes off the gradient of P.

    In: out and grad `[N, T, D]`. Out: delta, of the shape of lse. Grid: N times the tiles of ROWS tokens.
    """
    tiles = num_blocks * (BLOCK // ROWS)
    head, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    out_RD = _tile(out, head, start, out_head, out_token, T, D, ROWS, WIDTH, False)
    grad_RD = _tile(grad, head, start, grad_head, grad_token, T, D, ROWS, WIDTH, False)
    i_R = start + tl.arange(0, ROWS)
    delta_R = tl.sum(out_RD.to(tl.float32) * grad_RD.to(tl.float32), 1)
    tl.store(delta + head.to(tl.int64) * num_blocks * BLOCK + i_R, delta_R)


@triton.jit
def _key_gradient(
    query,
    key,
    value,
    grad,
    lse,
    delta,
    dkey,
    dvalue,
    end,
    queries_BB,
    num_queries_2B,
    query_head,
    query_token,
    key_head,
    key_token,
    value_head,
    value_token,
    grad_head,
    grad_token,
    dkey_head,
    dkey_token,
    T,
    num_blocks,
    group,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
    FOR_KEY: tl.constexpr,
    FOR_VALUE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of keys, of values or of both, of one key head, summed over its query heads in order.

    In: query and grad `[N, T, D]`, key and value `[G, T, D]`, lse and delta, end `[T]`, the query lists.
    Out: dkey and dvalue `[G, T, D]`, of equal strides. Grid: G times the key tiles, the first ones, which most
    queries see, first.
    """
    tiles = tl.cdiv(T, OWN)
    key_head_index, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * OWN
    block = start // BLOCK
    listed = queries_BB + block.to(tl.int64) * num_blocks
    full = tl.load(num_queries_2B + block) * (BLOCK // STEP)
    visible = tl.load(num_queries_2B + num_blocks + block) * (BLOCK // STEP)
    k_MD = _tile(key, key_head_index, start, key_head, key_token, T, D, OWN, WIDTH, TMA)
    v_MD = _tile(value, key_head_index, start, value_head, value_token, T, D, OWN, WIDTH, TMA)
    j_M = start + tl.arange(0, OWN)
    end_M = tl.load(end + j_M, mask=j_M < T, other=0)
    dk_MD = tl.zeros((OWN, WIDTH), tl.float32)
    dv_MD = tl.zeros((OWN, WIDTH), tl.float32)
    for masked in tl.static_range(2):
        # the heads and their steps in one loop, so that loads run ahead across heads
        steps = visible - full if masked else full
        for index in range(steps * group):
            head = key_head_index * group + index // steps
            step = _step_start(listed, full * masked + index % steps, BLOCK, STEP)
            i_S = step + tl.arange(0, STEP)
            q_SD = _tile(query, head, step, query_head, query_token, T, D, STEP, WIDTH, TMA)
            score_MS = tl.dot(k_MD, q_SD.T, input_precision=PRECISION) * (scale * LOG2_E)
            if masked:
                score_MS = tl.where((j_M[:, None] <= i_S) & (i_S < end_M[:, None]), score_MS, -float("inf"))
            lse_S = tl.load(lse + head.to(tl.int64) * num_blocks * BLOCK + i_S)
            p_MS = tl.exp2(score_MS - lse_S)
            grad_SD = _tile(grad, head, step, grad_head, grad_token, T, D, STEP, WIDTH, TMA)
            if FOR_VALUE:
                dv_MD = tl.dot(p_MS.to(grad_SD.dtype), grad_SD, dv_MD, input_precision=PRECISION)
            if FOR_KEY:
                delta_S = tl.load(delta + head.to(tl.int64) * num_blocks * BLOCK + i_S)
                # the mean is taken off in the accumulator, where it costs no register of its own
                minus_MS = tl.broadcast_to(-delta_S[None, :], (OWN, STEP))
                ds_MS = p_MS * tl.dot(v_MD, grad_SD.T, minus_MS, input_precision=PRECISION)
                dk_MD = tl.dot(ds_MS.to(q_SD.dtype), q_SD, dk_MD, input_precision=PRECISION)
    if FOR_KEY:
        _store_tile(dkey, dk_MD * scale, key_head_index, start, dkey_head, dkey_token, T, D, OWN, WIDTH)
    if FOR_VALUE:
        _store_tile(dvalue, dv_MD, key_head_index, start, dkey_head, dkey_token, T, D, OWN, WIDTH)


@triton.jit
def _query_gradient(
    query,
    key,
    value,
    grad,
    lse,
    delta,
    dquery,
    end,
    keys_BB,
    num_keys_2B,
    query_head,
    query_token,
    key_head,
    key_token,
    value_head,
    value_token,
    grad_head,
    grad_token,
    dquery_head,
    dquery_token,
    T,
    num_blocks,
    group,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a tile of queries of one head.

    In: query and grad `[N, T, D]`, key and value `[G, T, D]`, lse and delta, end `[T]`, the key lists.
    Out: dquery `[N, T, D]`. Grid: as in the forward pass.
    """
    tiles = tl.cdiv(T, OWN)
    head = tl.program_id(0) // tiles
    start = (tiles - 1 - tl.program_id(0) % tiles) * OWN
    block = start // BLOCK
    listed = keys_BB + block.to(tl.int64) * num_blocks
    full = tl.load(num_keys_2B + block) * (BLOCK // STEP)
    visible = tl.load(num_keys_2B + num_blocks + block) * (BLOCK // STEP)
    q_MD = _tile(query, head, start, query_head, query_token, T, D, OWN, WIDTH, TMA)
    grad_MD = _tile(grad, head, start, grad_head, grad_token, T, D, OWN, WIDTH, TMA)
    i_M = start + tl.arange(0, OWN)
    lse_M = tl.load(lse + head.to(tl.int64) * num_blocks * BLOCK + i_M)
    delta_M = tl.load(delta + head.to(tl.int64) * num_blocks * BLOCK + i_M)
    dq_MD = tl.zeros((OWN, WIDTH), tl.float32)
    for masked in tl.static_range(2):
        for index in range(full * masked, visible if masked else full):
            step = _step_start(listed, index, BLOCK, STEP)
            k_SD = _tile(key, head // group, step, key_head, key_token, T, D, STEP, WIDTH, TMA)
            score_MS = tl.dot(q_MD, k_SD.T, input_precision=PRECISION) * (scale * LOG2_E)
            if masked:
                j_S = step + tl.arange(0, STEP)
                end_S = tl.load(end + j_S, mask=j_S < T, other=0)
                score_MS = tl.where((j_S <= i_M[:, None]) & (i_M[:, None] < end_S), score_MS, -float("inf"))
            p_MS = tl.exp2(score_MS - lse_M[:, None])
            v_SD = _tile(value, head // group, step, value_head, value_token, T, D, STEP, WIDTH, TMA)
            dp_MS = tl.dot(grad_MD, v_SD.T, input_precision=PRECISION)
            ds_MS = p_MS * (dp_MS - delta_M[:, None])
            dq_MD = tl.dot(ds_MS.to(k_SD.dtype), k_SD, dq_MD, input_precision=PRECISION)
    _store_tile(dquery, dq_MD * scale, head, start, dquery_head, dquery_token, T, D, OWN, WIDTH)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lists: BlockLists, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output as `[1, N, T, D]` over memory `[1, T, N, D]`, and the base-2 log-sum-exp in fp32."""
    (_, N, T, _), num_blocks = query.shape, len(lists.keys_BB)
    out = _tokens_first(query)
    lse_NT = torch.empty((N, num_blocks * lists.block), dtype=torch.float32, device=query.device)
    own, _, _ = _sweeps(query)
    sources, strides, options = _sources((query, key, value), own, lists.block, (True, False, False))
    _forward[(N * num_blocks * (lists.block // options["OWN"]),)](
        *sources,
        out,
        lse_NT,
        lists.end_T,
        lists.keys_BB,
        lists.num_keys_2B,
        *strides,
        *out.stride()[1:3],
        T,
        num_blocks,
        N // key.shape[1],
        scale * LOG2_E.value,
        **options,
    )
    return out, lse_NT


def backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse_NT: torch.Tensor,
    grad: torch.Tensor,
    lists: BlockLists,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, each `[1, heads, T, D]` over memory `[1, T, heads, D]`."""
    (_, N, T, D), G, num_blocks = query.shape, key.shape[1], len(lists.keys_BB)
    rows = min(DELTA_ROWS, lists.block)
    delta_NT = torch.empty_like(lse_NT)
    _delta[(N * num_blocks * (lists.block // rows),)](
        out,
        grad,
        delta_NT,
        *out.stride()[1:3],
        *grad.stride()[1:3],
        T,
        num_blocks,
        D=D,
        WIDTH=_width(D),
        BLOCK=lists.block,
        ROWS=rows,
        num_warps=4,
    )
    dquery, dkey, dvalue = _tokens_first(query), _tokens_first(key), _tokens_first(value)
    _, of_keys, of_queries = _sweeps(query)
    tensors = (query, key, value, grad)
    sources, strides, options = _sources(tensors, of_keys, lists.block, (False, True, True, False))
    for parts in _key_gradient_parts(D):
        _key_gradient[(G * triton.cdiv(T, options["OWN"]),)](
            *sources,
            lse_NT,
            delta_NT,
            dkey,
            dvalue,
            lists.end_T,
            lists.queries_BB,
            lists.num_queries_2B,
            *strides,
            *dkey.stride()[1:3],
            T,
            num_blocks,
            N // G,
            scale,
            **parts,
            **options,
        )
    sources, strides, options = _sources(tensors, of_queries, lists.block, (True, False, False, True))
    _query_gradient[(N * triton.cdiv(T, options["OWN"]),)](
        *sources,
        lse_NT,
        delta_NT,
        dquery,
        lists.end_T,
        lists.keys_BB,
        lists.num_keys_2B,
        *strides,
        *dquery.stride()[1:3],
        T,
        num_blocks,
        N // G,
        scale,
        **options,
    )
    return dquery, dkey, dvalue


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor of the shape of `x` `[1, heads, T, D]` over memory `[1, T, heads, D]`."""
    return x.new_empty((1, x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)


def _width(D: int) -> int:
    """Columns of a tile: tiles are powers of two wide, and a matrix instruction takes 16."""
    return max(16, triton.next_power_of_2(D))


def _key_gradient_parts(D: int) -> list[dict[str, bool]]:
    """The launches of the key gradient: beyond 128 columns the sums of keys and values do not fit the registers."""
    both = {"FOR_KEY": True, "FOR_VALUE": True}
    return [both] if D <= 128 else [both | {"FOR_VALUE": False}, both | {"FOR_KEY": False}]


def _sweeps(query: torch.Tensor) -> tuple[Sweep, Sweep, Sweep]:
    """How the three kernels tile: forward, key gradient, query gradient."""
    table = TREE_ATTENTION_FP32 if query.dtype == torch.float32 else TREE_ATTENTION
    return table[architecture(query.device)][max(64, _width(query.shape[-1]))]


def _sources(
    tensors: tuple[torch.Tensor, ...], sweep: Sweep, block: int, own: tuple[bool, ...]
) -> tuple[list[Any], list[int], dict[str, Any]]:
    """What a kernel takes for tensors `[1, heads, T, D]`: pointers or descriptors, strides, and its options.

    `own` says of each tensor whether a program holds one tile of it; over the others it walks.
    """
    views = [x[0] for x in tensors]
    D = views[0].shape[-1]
    sizes = {True: min(sweep.own, block), False: min(sweep.step, block)}
    # the factors of exact fp32 products go through registers, and TMA lays them out for matrix instructions
    tma = views[0].dtype != torch.float32 and descriptors_fit(*views, *(x.transpose(0, 1) for x in views))
    options = {
        "D": D,
        "WIDTH": _width(D),
        "BLOCK": block,
        "OWN": sizes[True],
        "STEP": sizes[False],
        "TMA": tma,
        "PRECISION": dot_precision(views[0].dtype),
        "num_warps": sweep.num_warps,
        "num_stages": sweep.num_stages,
    }
    strides = [stride for x in views for stride in x.stride()[:2]]
    if not tma:
        return views, strides, options
    described = [
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, sizes[mine], options["WIDTH"]])
        for x, mine in zip(views, own, strict=True)
    ]
    return described, strides, options


def variants(architecture: int) -> Iterator[Variant]:
    """What ships: bf16 (fp16 compiles to the same but for the type) at every width of tiles, and fp32."""
    for type_name, widths, table in (
        ("bf16", (64, 80, 128, 256), TREE_ATTENTION),
        ("fp32", (64, 128, 256), TREE_ATTENTION_FP32),
    ):
        for D in widths:
            tma = architecture >= 90 and type_name != "fp32"
            own, of_keys, of_queries = table[architecture][max(64, _width(D))]
            yield _variant(_forward, type_name, D, own, ("query",), tma)
            for parts in _key_gradient_parts(D):
                yield _variant(_key_gradient, type_name, D, of_keys, ("key", "value"), tma, **parts)
            yield _variant(_query_gradient, type_name, D, of_queries, ("query", "grad"), tma)
            if D in (80, 128):
                yield _variant(_delta, type_name, D, Sweep(DELTA_ROWS, 0, 4, 3), (), False)


def _variant(
    kernel: Any, type_name: str, D: int, sweep: Sweep, own: tuple[str, ...], tma: bool, **parts: bool
) -> Variant:
    constants: dict[str, Any] = {"D": D, "WIDTH": _width(D), "TMA": tma, "BLOCK": BLOCK, "OWN": sweep.own, **parts}
    constants |= {"STEP": sweep.step, "ROWS": sweep.own, "PRECISION": "ieee" if type_name == "fp32" else "tf32"}
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in ("query", "key", "value", "grad") and tma:
            rows = sweep.own if name in own else sweep.step
            signature[name] = f"tensordesc<{type_name}[1,{rows},{_width(D)}]>"
        elif name in ("query", "key", "value", "grad", "out", "dquery", "dkey", "dvalue"):
            signature[name] = f"*{type_name}"
        elif name in ("lse", "delta"):
            signature[name] = "*fp32"
        elif name in ("end", "keys_BB", "num_keys_2B", "queries_BB", "num_queries_2B"):
            signature[name] = "*i32"
        elif name not in constants:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
    aligned = tuple(n for n, t in signature.items() if t.startswith("*") or n.endswith(("_head", "_token")))
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    only = " ".join(name for name, value in parts.items() if value and not all(parts.values()))
    name = f"tree_attention{kernel.fn.__name__} {type_name} D{D} {only}".strip()
    return Variant(name, kernel, signature, constants, sweep.num_warps, sweep.num_stages, aligned)
