"""Margins, losses and slopes of pairs, and the gradients of rows, for a range of pairs and rows.

P pairs, R head rows, E entries, all in the order of `pairs.Structure`. Everything is summed in float64.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from ttpa_kernels.engine import Engine
from ttpa_kernels.token_dpo.pairs import Structure

LossType = Literal["sigmoid", "robust", "hinge", "ipo", "linear"]
LOSS_TYPES: tuple[LossType, ...] = ("sigmoid", "robust", "hinge", "ipo", "linear")


class Loss(NamedTuple):
    """`sum_p u_p f(beta m_p + gamma_p) / denominator`."""

    beta: float
    loss_type: str
    label_smoothing: float
    denominator: float
    margin_P: torch.Tensor | None = None  # gamma
    pair_weight_P: torch.Tensor | None = None  # u


class PairValues(NamedTuple):
    """Of each pair, fp64: `m`, `beta m`, its part of the loss, and the derivative of the loss in m."""

    margin_P: torch.Tensor
    reward_P: torch.Tensor
    loss_P: torch.Tensor
    slope_P: torch.Tensor

    @classmethod
    def empty(cls, num_pairs: int, device: torch.device) -> PairValues:
        return cls(*(torch.empty(num_pairs, dtype=torch.float64, device=device) for _ in range(4)))


class Part(NamedTuple):
    """Ranges of pairs, rows and entries that belong together: some components, or all."""

    pairs: slice
    rows: slice
    entries: slice


def pair_values_(
    out: PairValues,
    structure: Structure,
    part: Part,
    logp_R: torch.Tensor,
    ref_logp_R: torch.Tensor | None,
    loss: Loss,
    *,
    engine: Engine,
) -> None:
    """Fill in the pairs of a part."""
    if engine == "triton":
        from ttpa_kernels.token_dpo import kernel

        return kernel.pair_values_(out, structure, part, logp_R, ref_logp_R, loss)
    pair_Q, row_E = structure.order_P[part.pairs], structure.row_E[part.entries]
    D_E = logp_R[row_E].double()
    if ref_logp_R is not None:
        D_E -= ref_logp_R[row_E]
    start_Q = structure.start_P[part.pairs.start : part.pairs.stop + 1]
    m_Q = _segment_sums(D_E * structure.value_E[part.entries], start_Q, part)
    reward_Q = loss.beta * m_Q
    x_Q = reward_Q if loss.margin_P is None else reward_Q + loss.margin_P[pair_Q]
    f_Q, slope_Q = _f(x_Q, loss)
    if loss.pair_weight_P is not None:
        u_Q = loss.pair_weight_P[pair_Q].double()
        f_Q, slope_Q = u_Q * f_Q, u_Q * slope_Q
    values = m_Q, reward_Q, f_Q / loss.denominator, slope_Q * (loss.beta / loss.denominator)
    for whole_P, value_Q in zip(out, values, strict=True):
        whole_P[pair_Q] = value_Q


def row_gradients_(
    out_R: torch.Tensor,
    structure: Structure,
    part: Part,
    slope_P: torch.Tensor,
    *,
    upstream: torch.Tensor | None = None,
    engine: Engine,
) -> None:
    """Write `C^T slope`, times the upstream gradient of the loss where given, to the rows of a part."""
    if engine == "triton":
        from ttpa_kernels.token_dpo import kernel

        return kernel.row_gradients_(out_R, structure, part, slope_P, upstream=upstream)
    gradient_E = structure.coefficient_E[part.entries] * slope_P[structure.pair_E[part.entries]]
    start_Q = structure.start_R[part.rows.start : part.rows.stop + 1]
    gradient_Q = _segment_sums(gradient_E, start_Q, part)
    if upstream is not None:
        gradient_Q *= upstream
    out_R[structure.order_R[part.rows]] = gradient_Q.to(out_R.dtype)


def totals(values: PairValues, dtype: torch.dtype, *, engine: Engine) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss in `dtype`, and fp64 means over the pairs: the reward, and how often it is above 0 (0 without pairs)."""
    if engine == "triton":
        from ttpa_kernels.token_dpo import kernel

        return kernel.totals(values, dtype)
    means_2 = torch.stack([values.reward_P.sum(), (values.reward_P > 0).sum()]) / max(len(values.reward_P), 1)
    return values.loss_P.sum().to(dtype), means_2


def _segment_sums(value_E: torch.Tensor, start_Q: torch.Tensor, part: Part) -> torch.Tensor:
    offsets_Q = start_Q - part.entries.start
    return torch.segment_reduce(value_E, "sum", offsets=offsets_Q, initial=0.0, unsafe=True)


def _f(x_P: torch.Tensor, loss: Loss) -> tuple[torch.Tensor, torch.Tensor]:
    """`f(x)` and its derivative; `-log sigmoid(x)` is `softplus(-x)`."""
    e = loss.label_smoothing
    if loss.loss_type == "sigmoid":
        f_P = (1 - e) * F.softplus(-x_P, threshold=40.0) + e * F.softplus(x_P, threshold=40.0)
        return f_P, e * torch.sigmoid(x_P) - (1 - e) * torch.sigmoid(-x_P)
    if loss.loss_type == "robust":
        f_P = (1 - e) * F.softplus(-x_P, threshold=40.0) - e * F.softplus(x_P, threshold=40.0)
        return f_P / (1 - 2 * e), (-e * torch.sigmoid(x_P) - (1 - e) * torch.sigmoid(-x_P)) / (1 - 2 * e)
    if loss.loss_type == "hinge":
        return torch.where(x_P >= 1, 0.0, 1 - x_P), torch.where(x_P >= 1, 0.0, -1.0).to(x_P.dtype)
    if loss.loss_type == "ipo":
        return ((x_P - 0.5) / loss.beta) ** 2, (2 * x_P - 1) / loss.beta**2
    return -x_P, torch.full_like(x_P, -1.0)
