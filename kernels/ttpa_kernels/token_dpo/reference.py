"""The plain truth that `token_dpo` is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def token_dpo_reference(
    logp_R: torch.Tensor,
    ref_logp_R: torch.Tensor | None,
    C_PR: torch.Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    margin_P: torch.Tensor | None = None,
    pair_weight_P: torch.Tensor | None = None,
    denominator: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the margins `m = C D` for a dense C, all in `dtype`; the gradient is autograd's."""
    D_R = logp_R.to(dtype) if ref_logp_R is None else logp_R.to(dtype) - ref_logp_R.detach().to(dtype)
    m_P = C_PR.to(dtype) @ D_R
    x_P = beta * m_P if margin_P is None else beta * m_P + margin_P
    wrong_P, right_P = -F.logsigmoid(x_P), -F.logsigmoid(-x_P)
    f_P = {
        "sigmoid": (1 - label_smoothing) * wrong_P + label_smoothing * right_P,
        "robust": ((1 - label_smoothing) * wrong_P - label_smoothing * right_P) / (1 - 2 * label_smoothing),
        "hinge": torch.relu(1 - x_P),
        "ipo": ((x_P - 0.5) / beta) ** 2,
        "linear": -x_P,
    }[loss_type]
    u_P = torch.ones_like(f_P) if pair_weight_P is None else pair_weight_P
    return (u_P * f_P).sum() / (max(len(m_P), 1) if denominator is None else denominator), m_P.detach()
