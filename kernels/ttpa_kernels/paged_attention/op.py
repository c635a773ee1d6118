"""Attention of new tokens over a paged cache: what the engines share, checks and dispatch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ttpa_kernels.engine import Engine, choose_engine
from ttpa_kernels.paged_attention import runs
from ttpa_kernels.paged_attention.decode import DecodeLayout
from ttpa_kernels.paged_attention.items import Items, items
from ttpa_kernels.paged_attention.layout import PagedLayout, Segment, check_segments, slots

__all__ = ["DecodeLayout", "PagedLayout", "Segment", "paged_attention", "paged_layout", "store_paged_"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the Triton kernels
MAX_WIDTH = 256
MAX_GROUP = 16  # query heads that fit the tile of one token


def paged_layout(
    segments: Sequence[Segment], *, page_size: int, device: torch.device | str, engine: Engine | None = None
) -> PagedLayout:
    """A pass of T tokens, those of the segments one after the other, prepared for `paged_attention` of all layers.

    The host's lists are read here and can change afterwards. Engines: 'triton' (GPUs of compute capability 8.0 and
    above; a page of a multiple of 16 slots), 'torch' (anywhere); None lets the device decide. Raises ValueError for
    segments that do not fit their pages or each other.
    """
    device = torch.device(device)
    engine = choose_engine(device, engine)
    check_segments(segments, page_size=page_size)
    slot_T = np.concatenate([slots(s, s.start, s.stop, page_size=page_size) for s in segments])
    num_slots = (1 + max(max(s.pages[: -(-s.stop // page_size)]) for s in segments)) * page_size
    if engine == "triton" and page_size % 16:
        raise ValueError(f"page_size is {page_size}: engine='triton' takes multiples of 16")
    pack = items if engine == "triton" else runs.pack
    work = pack(segments, page_size=page_size, device=device)
    slots_on_device = torch.from_numpy(slot_T).to(device, non_blocking=True)
    return PagedLayout(engine, page_size, len(slot_T), num_slots, slots_on_device, work)


def store_paged_(
    key_GSD: torch.Tensor, value_GSD: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PagedLayout
) -> None:
    """Write keys and values `[1, G, T, D]` of the new tokens, any strides, to their slots of a cache `[G, S, D]`.

    Raises ValueError for shapes that do not fit the cache and the layout, and TypeError for another dtype.
    """
    G, _, D = _check_cache(key_GSD, value_GSD, layout)
    shapes = f"key {tuple(key.shape)} and value {tuple(value.shape)}"
    if key.shape != value.shape or key.shape != (1, G, layout.num_tokens, D):
        raise ValueError(f"{shapes} must be {(1, G, layout.num_tokens, D)}: [1, G, T, D] of this cache and layout")
    if not key.dtype == value.dtype == key_GSD.dtype:
        raise TypeError(f"key is {key.dtype} and value {value.dtype}: give {key_GSD.dtype}, the dtype of the cache")
    key_GSD.index_copy_(1, layout.slot_T, key[0])
    value_GSD.index_copy_(1, layout.slot_T, value[0])


def paged_attention(
    query: torch.Tensor,
    key_GSD: torch.Tensor,
    value_GSD: torch.Tensor,
    layout: PagedLayout,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """`out[t, n] = sum_s P_ns v[s]`, `P_n = softmax_s(scale q[n, t] k[s])` over the slots s of the positions up to t's.

    query `[1, N, T, D]`, any strides, N a multiple of G: query head n reads key head `n G // N`. The caches `[G, S, D]`
    hold the new tokens already (`store_paged_`); what stands in slots that no token sees has no effect, be it NaN.
    fp32, bf16 or fp16 (with 'torch' also fp64), all alike; products and softmax accumulate in fp32; scale, positive, is
    `D ** -0.5` unless given; D up to 256 and N / G up to 16 with 'triton'. Returns `[1, T, N, D]`, contiguous, without
    a gradient. Raises ValueError or TypeError. Keys that the segments of a group share are read once for all their
    tokens: Juravsky et al., arXiv 2402.05099; ranges of keys are merged by their log-sum-exp.
    """
    G, _, D = _check_cache(key_GSD, value_GSD, layout)
    if query.ndim != 4 or query.shape[0] != 1 or query.shape[2:] != (layout.num_tokens, D) or query.shape[1] % G:
        raise ValueError(
            f"query {tuple(query.shape)} must be [1, N, {layout.num_tokens}, {D}], the tokens of the layout and the "
            f"width of the cache, with N a multiple of its {G} heads"
        )
    if query.dtype != key_GSD.dtype:
        raise TypeError(f"query is {query.dtype}, the cache {key_GSD.dtype}: give both the same dtype")
    scale = D**-0.5 if scale is None else scale
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale is {scale}: give a positive number, or None for the width of a head ** -0.5")
    if layout.engine == "torch":
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            return runs.attention(query, key_GSD, value_GSD, layout.pack, scale)
    if query.dtype not in DTYPES:
        raise TypeError(f"query is {query.dtype}: give one of {', '.join(map(str, DTYPES))}, or engine='torch'")
    if D > MAX_WIDTH or query.shape[1] > MAX_GROUP * G:
        raise ValueError(
            f"query {tuple(query.shape)} over {G} key heads: the width is at most {MAX_WIDTH} and the query heads of a "
            f"key head are at most {MAX_GROUP}, or make the layout for engine='torch'"
        )
    # kernels read rows of a head in one piece
    query, key_GSD, value_GSD = (
        x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (query, key_GSD, value_GSD)
    )
    return _attend(query, key_GSD, value_GSD, *layout.pack, layout.page_size, scale)


@torch.library.custom_op("ttpa_kernels::paged_attention", mutates_args=())
def _attend(
    query: torch.Tensor,
    key_GSD: torch.Tensor,
    value_GSD: torch.Tensor,
    narrow_IF: torch.Tensor,
    wide_IF: torch.Tensor,
    most: int,
    token: torch.Tensor,
    page: torch.Tensor,
    position_T: torch.Tensor,
    partial_T: torch.Tensor,
    parts_T: torch.Tensor,
    num_partials: int,
    merge: bool,
    page_size: int,
    scale: float,
) -> torch.Tensor:
    from ttpa_kernels.paged_attention import kernel

    work = Items(narrow_IF, wide_IF, most, token, page, position_T, partial_T, parts_T, num_partials, merge)
    return kernel.forward(query, key_GSD, value_GSD, work, page_size, scale)


@_attend.register_fake
def _(query: torch.Tensor, *rest: object) -> torch.Tensor:
    _, N, T, D = query.shape
    return query.new_empty((1, T, N, D))


def _check_cache(key_GSD: torch.Tensor, value_GSD: torch.Tensor, layout: PagedLayout) -> torch.Size:
    shapes = f"key_GSD {tuple(key_GSD.shape)} and value_GSD {tuple(value_GSD.shape)}"
    if key_GSD.ndim != 3 or key_GSD.shape != value_GSD.shape:
        raise ValueError(f"{shapes} must be [G, S, D], of the same shape")
    if key_GSD.shape[1] < layout.num_slots:
        raise ValueError(f"{shapes} have fewer slots than the {layout.num_slots} that the pages of the layout reach to")
    if key_GSD.dtype != value_GSD.dtype:
        raise TypeError(f"key_GSD is {key_GSD.dtype} and value_GSD {value_GSD.dtype}: give both the same dtype")
    return key_GSD.shape
