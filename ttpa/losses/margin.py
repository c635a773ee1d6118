"""Losses that are a function of one margin for each pair, `m = C (logp - ref_logp)`."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from ttpa_kernels.token_dpo.op import token_dpo
from ttpa_kernels.token_dpo.segments import LossType

from ttpa.losses.options import LossOptions
from ttpa.losses.rows import LossAndMetrics, Rows, margin_metrics


def sigmoid(rows: Rows, options: LossOptions) -> LossAndMetrics:
    """DPO (arXiv 2305.18290 eq. 7): `-log sigmoid(beta m)`; with label smoothing e conservative DPO,
    `-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m)` (ericmitchell.ai/cdpo.pdf eq. 3)."""
    return _kernel(rows, "sigmoid", beta=options.beta, label_smoothing=options.label_smoothing)


def robust(rows: Rows, options: LossOptions) -> LossAndMetrics:
    """Robust DPO (arXiv 2403.00409): `(-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2e)`, unbiased
    where a share e, `label_smoothing`, of the pairs is the wrong way round."""
    return _kernel(rows, "robust", beta=options.beta, label_smoothing=options.label_smoothing)


def hinge(rows: Rows, options: LossOptions) -> LossAndMetrics:
    """SLiC (arXiv 2305.10425) with the margin of RSO (arXiv 2309.06657): `max(0, 1 - beta m)`."""
    return _kernel(rows, "hinge", beta=options.beta)


def ipo(rows: Rows, options: LossOptions) -> LossAndMetrics:
    """IPO (arXiv 2310.12036 eq. 17): `(m - 1 / (2 beta))^2`, the margin a difference of means over the sides. The paper
    has sums; we follow TRL, to whom the authors confirmed the means."""
    return _kernel(rows, "ipo", beta=options.beta)


def simpo(rows: Rows, options: LossOptions) -> LossAndMetrics:
    """SimPO (arXiv 2405.14734 eq. 6): `-log sigmoid(beta m - simpo_gamma)`, the margin a difference of mean
    log-probabilities, without a reference."""
    P, device = rows.chosen_PR.shape[0], rows.logp_R.device
    margin_P = torch.full((P,), -options.simpo_gamma, dtype=torch.float64, device=device)
    return sigmoid(replace(rows, margin_P=margin_P if rows.margin_P is None else margin_P + rows.margin_P), options)


def discopop(rows: Rows, options: LossOptions) -> LossAndMetrics:
    """DiscoPOP, log-ratio modulated loss (arXiv 2406.08414 eq. 5, as TRL): with `x = beta m` and
    `s = sigmoid(x / discopop_tau)`, `-(1 - s) log sigmoid(x) + s exp(-x)`; the gradient goes through s too."""
    chosen_P, rejected_P = rows.log_ratios()
    reward_P = options.beta * (chosen_P - rejected_P)
    x_P = reward_P if rows.margin_P is None else reward_P + rows.margin_P
    share_P = torch.sigmoid(x_P / options.discopop_tau)
    loss = rows.total(-(1 - share_P) * F.logsigmoid(x_P) + share_P * torch.exp(-x_P))
    return loss, margin_metrics(reward_P)


def sft(rows: Rows, options: LossOptions) -> LossAndMetrics:
    """Likelihood of the chosen tokens: `-sum logp / denominator`, the weights each token once; the denominator is the
    number of such tokens in the step. TRL's `sft` counts a completion once for each pair that has it, and divides by
    the tokens of the micro-batch, so that there accumulation changes the loss."""
    loss, _ = _kernel(rows, "linear", beta=1.0)
    return loss, {}


def _kernel(
    rows: Rows,
    loss_type: LossType,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> LossAndMetrics:
    loss, margins = token_dpo(
        logp_R=rows.logp_R,
        ref_logp_R=rows.ref_logp_R,
        pairs=rows.pairs,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        margin_P=rows.margin_P,
        pair_weight_P=rows.pair_weight_P,
        denominator=rows.denominator,
    )
    return loss, margin_metrics(margins.reward_P)
