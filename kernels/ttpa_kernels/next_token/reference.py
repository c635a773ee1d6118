"""The plain truth that `next_token` is tested against."""

from __future__ import annotations

import torch

from ttpa_kernels.linear_logp.reference import reference_logits
from ttpa_kernels.next_token.noise import gumbel
from ttpa_kernels.next_token.op import NextToken


def next_token_reference(
    hidden_BH: torch.Tensor,
    weight_VH: torch.Tensor,
    *,
    num_top: int,
    key_B: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **options: torch.Tensor | float | None,
) -> NextToken:
    """`next_token` from all logits at once, in `dtype`; options are those of `reference_logits`."""
    z_BV = reference_logits(hidden_BH, weight_VH, dtype=dtype, **options)  # type: ignore[arg-type]
    return next_token_from(z_BV, num_top=num_top, key_B=key_B)


def next_token_from(z_BV: torch.Tensor, *, num_top: int, key_B: torch.Tensor | None = None) -> NextToken:
    """`H = -sum p log p`, `sum p (log p + H)^2`, the first tokens of a stable descending sort, `argmax z + noise`."""
    logp_BV = torch.log_softmax(z_BV, dim=1)
    p_BV = logp_BV.exp()
    entropy_B = -torch.where(p_BV > 0, p_BV * logp_BV, 0.0).sum(dim=1)
    varentropy_B = torch.where(p_BV > 0, p_BV * (logp_BV + entropy_B[:, None]) ** 2, 0.0).sum(dim=1)
    top_logit_BV, top_id_BV = z_BV.sort(dim=1, descending=True, stable=True)
    draw_B = draw_logp_B = None
    if key_B is not None:
        draw_B = (z_BV + gumbel(key_B, 0, z_BV.shape[1])).argmax(dim=1)
        draw_logp_B = logp_BV.gather(1, draw_B[:, None])[:, 0]
    top = top_logit_BV[:, :num_top], top_id_BV[:, :num_top]
    return NextToken(z_BV.logsumexp(dim=1), entropy_B, varentropy_B, *top, draw_B, draw_logp_B)
