"""The plain truth that `linear_logp` is tested against."""

from __future__ import annotations

import torch


def linear_logp_reference(
    hidden_RH: torch.Tensor, weight_VH: torch.Tensor, target_R: torch.Tensor, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """`logp_R[r] = z_r[target_r] - log sum_v exp(z_r[v])` with `z_r = W h_r`, all in `dtype`."""
    logits_RV = hidden_RH.to(dtype) @ weight_VH.to(dtype).T
    return torch.log_softmax(logits_RV, dim=1).gather(1, target_R[:, None])[:, 0]
