"""The engine `torch`: a pack as few calls of PyTorch's scaled dot product attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention


class Span(NamedTuple):
    """A run of tokens that sees nothing outside: a trunk that is plain causal, and branches under a bias."""

    trunk: slice
    branches: slice
    whole: slice
    bias: torch.Tensor  # [branch tokens, tokens of the span], 0 where a key is seen, -inf elsewhere


def spans(end_T: torch.Tensor) -> tuple[Span, ...]:
    """Cut a pack into the smallest spans. A tree is one; its trunk is its prompt, with what nothing branches from."""
    device, end_T = end_T.device, end_T.cpu().long()
    index_T = torch.arange(len(end_T))
    stops = (1 + (end_T.cummax(dim=0).values == 1 + index_T).nonzero()[:, 0]).tolist()
    found = []
    for start, stop in zip([0, *stops], stops, strict=False):
        i, end = index_T[start:stop], end_T[start:stop]
        trunk = int((end == stop).long().cumprod(dim=0).sum())
        sees = (i <= i[trunk:, None]) & (i[trunk:, None] < end)
        bias = torch.zeros(sees.shape).masked_fill_(~sees, -torch.inf).to(device)
        found.append(Span(slice(start, start + trunk), slice(start + trunk, stop), slice(start, stop), bias))
    return tuple(found)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: tuple[Span, ...], scale: float
) -> torch.Tensor:
    """`tree_attention` span by span; a tensor `[1, T, N, D]` seen as `[1, N, T, D]`."""
    # Off the CPU the kernels that take a mask want as many key heads as query heads.
    grouped = query.device.type == "cpu"
    if not grouped:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    parts = []
    for span in pack:
        if span.trunk.start < span.trunk.stop:
            q, k, v = (x[:, :, span.trunk] for x in (query, key, value))
            parts.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped))
        if span.branches.start < span.branches.stop:
            q, k, v = query[:, :, span.branches], key[:, :, span.whole], value[:, :, span.whole]
            bias = span.bias.to(q.dtype)
            parts.append(scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=grouped))
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)
