"""The plain truth that `paged_attention` is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ttpa_kernels.paged_attention.layout import Segment


def paged_attention_reference(
    query: torch.Tensor,
    key_GSD: torch.Tensor,
    value_GSD: torch.Tensor,
    segments: Sequence[Segment],
    *,
    page_size: int,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """`[1, T, N, D]`: for every token the keys that it sees are gathered, and a softmax is taken, all in `dtype`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[1] // len(key_GSD)
    rows: list[torch.Tensor] = []
    for pages, start, count, _, _ in segments:
        for position in range(start, start + count):
            seen = [pages[p // page_size] * page_size + p % page_size for p in range(position + 1)]
            k_NSD, v_NSD = (x[:, seen].to(dtype).repeat_interleave(group, dim=0) for x in (key_GSD, value_GSD))
            q_ND = query[0, :, len(rows)].to(dtype)
            p_NS = (torch.einsum("nd,nsd->ns", q_ND, k_NSD) * scale).softmax(dim=-1)
            rows.append(torch.einsum("ns,nsd->nd", p_NS, v_NSD))
    return torch.stack(rows)[None]
