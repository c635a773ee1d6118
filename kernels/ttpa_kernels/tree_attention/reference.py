"""The plain truth that `tree_attention` is tested against."""

from __future__ import annotations

import torch


def tree_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    end_T: torch.Tensor,
    *,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """`softmax(scale Q K^T) V` with the mask `j <= i < end[j]` written out as `[T, T]`, all in `dtype`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group, T = query.shape[1] // key.shape[1], len(end_T)
    q = query.to(dtype)
    k, v = (x.to(dtype).repeat_interleave(group, dim=1) for x in (key, value))
    index = torch.arange(T, device=end_T.device)
    sees_TT = (index <= index[:, None]) & (index[:, None] < end_T)
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~sees_TT, -torch.inf)
    return scores.softmax(dim=-1) @ v
