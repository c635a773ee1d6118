"""The engine `triton`: online softmax of the tokens of an item over its range of keys, and the merge of ranges.

The query heads of one key head are rows of the same tile, so that a key is read once for all of them. Scores are kept
in base 2: a partial result is the normalised output of a range and `lse = log2 sum_s 2^(scale log2(e) q k_s)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ttpa_kernels.ahead import Variant
from ttpa_kernels.configs import PAGED_ATTENTION, PAGED_ATTENTION_FP32, Sweep
from ttpa_kernels.engine import architecture
from ttpa_kernels.numerics import dot_precision
from ttpa_kernels.paged_attention.items import FIELDS, Items

LOG2_E = 1.4426950408889634
MERGED = 16  # partial results that are read at once
MERGE_WARPS = 4
ITEM_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _attend(
    query,
    key,
    value,
    out,
    part_out,
    part_lse,
    item,
    token,
    page,
    position,
    partial,
    query_head,
    query_token,
    key_head,
    key_slot,
    value_head,
    value_slot,
    N,
    group,
    scale_log2,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output, or partial result, of `OWN // group` tokens of an item for the query heads of one key head.

    In: query `[N, T, D]`, key and value `[G, S, D]`, the arrays of `Items`. Out: out `[T, N, D]`, part_out
    `[partials, N, D]`, part_lse `[partials, N]`. Grid: items, key heads, tiles of tokens of an item.
    """
    fields = item + tl.program_id(0) * ITEM_FIELDS
    head = tl.program_id(1)
    tokens = OWN // group
    done = tl.program_id(2) * tokens
    left = tl.load(fields + 1) - done
    if left <= 0:
        return
    row, d, j = tl.arange(0, OWN), tl.arange(0, WIDTH), tl.arange(0, STEP)
    inside_M = row // group < tl.minimum(left, tokens)
    token_M = tl.load(token + tl.load(fields) + done + row // group, mask=inside_M, other=0).to(tl.int64)
    position_M = tl.load(position + token_M, mask=inside_M, other=-1).to(tl.int32)
    head_M = head * group + row % group
    inside_MD = inside_M[:, None] & (d < D)[None, :]
    q_MD = tl.load(
        query + (token_M * query_token + head_M * query_head)[:, None] + d[None, :], mask=inside_MD, other=0.0
    )
    pages = page + tl.load(fields + 2)
    stop = tl.minimum(tl.load(fields + 4), tl.max(position_M) + 1)
    key += head.to(tl.int64) * key_head
    value += head.to(tl.int64) * value_head
    out_MD = tl.zeros((OWN, WIDTH), tl.float32)
    top_M = tl.full((OWN,), -float("inf"), tl.float32)
    total_M = tl.zeros((OWN,), tl.float32)
    for start in range(tl.load(fields + 3), stop, STEP):
        j_S = start + j
        # what lies behind the range may never have been written: it is not read, since 0 times NaN is NaN
        inside_S = j_S < stop
        page_S = tl.load(pages + j_S // PAGE, mask=inside_S, other=0).to(tl.int64)
        slot_S = page_S * PAGE + j_S % PAGE
        inside_SD = inside_S[:, None]
        if D < WIDTH:
            inside_SD = inside_SD & (d < D)[None, :]
        k_SD = tl.load(key + (slot_S * key_slot)[:, None] + d[None, :], mask=inside_SD, other=0.0)
        score_MS = tl.dot(q_MD, k_SD.T, input_precision=PRECISION)
        score_MS = tl.where(inside_S[None, :] & (j_S[None, :] <= position_M[:, None]), score_MS, -float("inf"))
        new_M = tl.maximum(top_M, tl.max(score_MS, 1) * scale_log2)
        # a row that has seen no key yet has the maximum -inf, which cannot be subtracted
        shift_M = tl.where(new_M == -float("inf"), 0.0, new_M)
        p_MS = tl.exp2(score_MS * scale_log2 - shift_M[:, None])
        shrink_M = tl.exp2(top_M - shift_M)
        total_M = total_M * shrink_M + tl.sum(p_MS, 1)
        v_SD = tl.load(value + (slot_S * value_slot)[:, None] + d[None, :], mask=inside_SD, other=0.0)
        out_MD = tl.dot(p_MS.to(v_SD.dtype), v_SD, out_MD * shrink_M[:, None], input_precision=PRECISION)
        top_M = new_M
    total_M = tl.where(total_M == 0.0, 1.0, total_M)  # where no key was seen: an output of 0, and -inf for lse
    lse_M = top_M + tl.log2(total_M)
    out_MD = out_MD / total_M[:, None]
    part = tl.load(fields + 5)
    if part < 0:
        tl.store(
            out + ((token_M * N + head_M) * D)[:, None] + d[None, :], out_MD.to(out.dtype.element_ty), mask=inside_MD
        )
    else:
        result_M = (tl.load(partial + token_M, mask=inside_M, other=0) + part).to(tl.int64) * N + head_M
        tl.store(part_out + (result_M * D)[:, None] + d[None, :], out_MD, mask=inside_MD)
        tl.store(part_lse + result_M, lse_M, mask=inside_M)


@triton.jit
def _merge(
    out,
    part_out,
    part_lse,
    partial,
    parts,
    N,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGED: tl.constexpr,
):
    """`out = sum_k 2^(lse_k - lse) out_k` of the partial results of one token and query head, 0 where it has none.

    In: part_out `[partials, N, D]`, part_lse `[partials, N]`, partial and parts `[T]`. Out: out `[T, N, D]`.
    Grid: tokens, query heads.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    number = tl.load(parts + token)
    if number == 1:
        return
    first = tl.load(partial + token).to(tl.int64)
    k, d = tl.arange(0, MERGED), tl.arange(0, WIDTH)
    out_D = tl.zeros((WIDTH,), tl.float32)
    top, total = tl.full((), -float("inf"), tl.float32), tl.zeros((), tl.float32)
    for start in range(0, number, MERGED):
        result_K = (first + start + k) * N + head
        lse_K = tl.load(part_lse + result_K, mask=start + k < number, other=-float("inf"))
        seen_KD = (lse_K > -float("inf"))[:, None] & (d < D)[None, :]
        out_KD = tl.load(part_out + (result_K * D)[:, None] + d[None, :], mask=seen_KD, other=0.0)
        new = tl.maximum(top, tl.max(lse_K))
        shift = tl.where(new == -float("inf"), 0.0, new)
        weight_K, shrink = tl.exp2(lse_K - shift), tl.exp2(top - shift)
        out_D = out_D * shrink + tl.sum(weight_K[:, None] * out_KD, 0)
        total = total * shrink + tl.sum(weight_K)
        top = new
    out_D = out_D / tl.where(total == 0.0, 1.0, total)
    tl.store(out + (token * N + head) * D + d, out_D.to(out.dtype.element_ty), mask=d < D)


def forward(
    query: torch.Tensor, key_GSD: torch.Tensor, value_GSD: torch.Tensor, work: Items, page_size: int, scale: float
) -> torch.Tensor:
    """The output `[1, T, N, D]` of a pass."""
    (_, N, T, D), G, device = query.shape, len(key_GSD), query.device
    out = torch.empty((1, T, N, D), dtype=query.dtype, device=device)
    part_out = torch.empty((work.num_partials, N, D), dtype=torch.float32, device=device)
    part_lse = torch.empty((work.num_partials, N), dtype=torch.float32, device=device)
    narrow, wide = _sweeps(query)
    for item_IF, most, sweep in ((work.wide_IF, work.most, wide), (work.narrow_IF, 1, narrow)):
        if len(item_IF):
            _attend[(len(item_IF), G, triton.cdiv(most, sweep.own // (N // G)))](
                query,
                key_GSD,
                value_GSD,
                out,
                part_out,
                part_lse,
                item_IF,
                work.token,
                work.page,
                work.position_T,
                work.partial_T,
                *query.stride()[1:3],
                *key_GSD.stride()[:2],
                *value_GSD.stride()[:2],
                N,
                N // G,
                scale * LOG2_E,
                D=D,
                WIDTH=_width(D),
                PAGE=page_size,
                OWN=sweep.own,
                STEP=sweep.step,
                PRECISION=dot_precision(query.dtype),
                num_warps=sweep.num_warps,
                num_stages=sweep.num_stages,
            )
    if work.merge:
        _merge[(T, N)](
            out,
            part_out,
            part_lse,
            work.partial_T,
            work.parts_T,
            N,
            D=D,
            WIDTH=_width(D),
            MERGED=MERGED,
            num_warps=MERGE_WARPS,
        )
    return out


def _width(D: int) -> int:
    """Columns of a tile: tiles are powers of two wide, and a matrix instruction takes 16."""
    return max(16, triton.next_power_of_2(D))


def _sweeps(query: torch.Tensor) -> tuple[Sweep, Sweep]:
    """How items of one token and of several are computed."""
    table = PAGED_ATTENTION_FP32 if query.dtype == torch.float32 else PAGED_ATTENTION
    return table[architecture(query.device)][max(64, _width(query.shape[-1]))]


def variants(architecture: int) -> Iterator[Variant]:
    """What ships: bf16 (fp16 compiles to the same but for the type) at every width of tiles, and fp32."""
    for type_name, widths, table in (
        ("bf16", (64, 80, 128, 256), PAGED_ATTENTION),
        ("fp32", (64, 128, 256), PAGED_ATTENTION_FP32),
    ):
        for D in widths:
            narrow, wide = table[architecture][max(64, _width(D))]
            yield _variant(_attend, "one token", type_name, D, narrow)
            yield _variant(_attend, "several tokens", type_name, D, wide)
            if D in (80, 128):
                yield _variant(_merge, "merge", type_name, D, Sweep(0, 0, MERGE_WARPS, 3))


def _variant(kernel: Any, name: str, type_name: str, D: int, sweep: Sweep) -> Variant:
    constants: dict[str, Any] = {"D": D, "WIDTH": _width(D), "PAGE": 16, "OWN": sweep.own, "STEP": sweep.step}
    constants |= {"PRECISION": "ieee" if type_name == "fp32" else "tf32", "MERGED": MERGED}
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    types = dict.fromkeys(("query", "key", "value", "out"), f"*{type_name}") | {"position": "*i64"}
    types |= dict.fromkeys(("part_out", "part_lse"), "*fp32") | {"scale_log2": "fp32"}
    types |= dict.fromkeys(("item", "token", "page", "partial", "parts"), "*i32") | {
        "key_head": "i64",
        "value_head": "i64",
    }
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
    aligned = tuple(
        argument
        for argument in signature
        if argument in ("query", "key", "value", "out", "part_out") or argument.endswith(("_head", "_token", "_slot"))
    )
    return Variant(
        f"paged_attention {name} {type_name} D{D}",
        kernel,
        signature,
        constants,
        sweep.num_warps,
        sweep.num_stages,
        aligned,
    )
