"""The plain truth that `linear_kl` is tested against."""

from __future__ import annotations

import torch


def linear_kl_reference(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    ref_hidden_RH: torch.Tensor,
    ref_weight_VH: torch.Tensor | None = None,
    *,
    bias_V: torch.Tensor | None = None,
    ref_bias_V: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """`kl_R[r] = sum_v p_ref (log p_ref - log p)` over the first `vocab_size` tokens, all in `dtype`."""
    if ref_weight_VH is None:
        ref_weight_VH, ref_bias_V = weight_VH, bias_V

    def log_probabilities(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = hidden.to(dtype) @ weight[:vocab_size].to(dtype).T
        x = logit_scale * (x if bias is None else x + bias[:vocab_size].to(dtype))
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        return torch.log_softmax(x / temperature, dim=1)

    ref_logp_RV = log_probabilities(ref_hidden_RH, ref_weight_VH, ref_bias_V).detach()
    return (ref_logp_RV.exp() * (ref_logp_RV - log_probabilities(hidden_RH, weight_VH, bias_V))).sum(dim=1)
