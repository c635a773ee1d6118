"""The plain truth that `linear_token_dpo` is tested against."""

from __future__ import annotations

from typing import Any

import torch

from ttpa_kernels.linear_logp.reference import linear_logp_reference
from ttpa_kernels.token_dpo.reference import token_dpo_reference


def linear_token_dpo_reference(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_R: torch.Tensor,
    ref_logp_R: torch.Tensor | None,
    C_PR: torch.Tensor,
    *,
    head: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    **loss: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the margins for a dense C, all in `dtype`; `head` holds the options of `linear_logp_reference`."""
    logp_R = linear_logp_reference(hidden_RH, weight_VH, target_R, dtype=dtype, **(head or {}))
    return token_dpo_reference(logp_R, ref_logp_R, C_PR, dtype=dtype, **loss)
