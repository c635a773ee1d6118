"""The plain truth that `linear_logp` is tested against."""

from __future__ import annotations

import torch


def reference_logits(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    adapter_RA: torch.Tensor | None = None,
    adapter_VA: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """`z = softcap tanh(x / softcap) / temperature` with `x = logit_scale (W h + B u + bias)`, all in `dtype`."""
    x_RV = hidden_RH.to(dtype) @ weight_VH.to(dtype).T
    if adapter_RA is not None and adapter_VA is not None:
        x_RV = x_RV + adapter_RA.to(dtype) @ adapter_VA.to(dtype).T
    if bias_V is not None:
        x_RV = x_RV + bias_V.to(dtype)
    x_RV = logit_scale * x_RV[:, :vocab_size]
    if softcap is not None:
        x_RV = softcap * torch.tanh(x_RV / softcap)
    return x_RV / temperature


def linear_logp_reference(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_R: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    **options: torch.Tensor | float | None,
) -> torch.Tensor:
    """`logp_R[r] = z_r[target_r] - log sum_v exp(z_r[v])`; options are those of `reference_logits`."""
    z_RV = reference_logits(hidden_RH, weight_VH, dtype=dtype, **options)  # type: ignore[arg-type]
    return torch.log_softmax(z_RV, dim=1).gather(1, target_R[:, None])[:, 0]


def head_stats_reference(z_RV: torch.Tensor, target_R: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The fields of `HeadStats` from logits."""
    logp_RV = torch.log_softmax(z_RV, dim=1)
    p_RV = logp_RV.exp()
    entropy_R = -torch.where(p_RV > 0, p_RV * logp_RV, 0.0).sum(dim=1)
    is_top1_R = z_RV.argmax(dim=1) == target_R
    return z_RV.logsumexp(dim=1), entropy_R, (p_RV * p_RV).sum(dim=1).log(), z_RV.mean(dim=1), is_top1_R
