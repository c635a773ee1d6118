"""Losses that look at each side of a pair apart, so that tokens which both sides share do not cancel."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ttpa.losses.options import LossOptions
from ttpa.losses.rows import LossAndMetrics, Rows, mean, side_metrics


def nca_pair(rows: Rows, options: LossOptions) -> LossAndMetrics:
    """NCA for pairs (arXiv 2402.05369): with `r = beta sum_t a_t (logp - ref_logp)` of either side,
    `-log sigmoid(r_w) - log sigmoid(-r_w) / 2 - log sigmoid(-r_l) / 2`."""
    chosen_P, rejected_P = (options.beta * side_P for side_P in rows.log_ratios())
    loss_P = -F.logsigmoid(chosen_P) - 0.5 * F.logsigmoid(-chosen_P) - 0.5 * F.logsigmoid(-rejected_P)
    return rows.total(loss_P), side_metrics(chosen_P, rejected_P)


def apo_zero(rows: Rows, options: LossOptions) -> LossAndMetrics:
    """APO-zero (arXiv 2408.06266 eq. 7): `1 - sigmoid(r_w) + sigmoid(r_l)`, chosen up and rejected down; the 1, which
    the paper does not have, is TRL's."""
    chosen_P, rejected_P = (options.beta * side_P for side_P in rows.log_ratios())
    return rows.total(torch.sigmoid(-chosen_P) + torch.sigmoid(rejected_P)), side_metrics(chosen_P, rejected_P)


def apo_down(rows: Rows, options: LossOptions) -> LossAndMetrics:
    """APO-down (arXiv 2408.06266 eq. 8): `sigmoid(r_w) + 1 - sigmoid(r_w - r_l)`, both down and rejected more, where
    the chosen sides are worse than what the model writes; the 1, which the paper does not have, is TRL's."""
    chosen_P, rejected_P = (options.beta * side_P for side_P in rows.log_ratios())
    loss_P = torch.sigmoid(chosen_P) + torch.sigmoid(rejected_P - chosen_P)
    return rows.total(loss_P), side_metrics(chosen_P, rejected_P)


def tdpo1(rows: Rows, options: LossOptions) -> LossAndMetrics:
    """TDPO1 (arXiv 2404.11999): `-log sigmoid(beta (m - (K_l - K_w)))`, with `K = sum_t a_t KL(ref || policy)` over the
    positions of a side and the gradient through both."""
    chosen_kl_P, rejected_kl_P = _divergences(rows)
    return _tdpo(rows, options, chosen_kl_P, rejected_kl_P, rejected_kl_P - chosen_kl_P)


def tdpo2(rows: Rows, options: LossOptions) -> LossAndMetrics:
    """TDPO2 (arXiv 2404.11999): `-log sigmoid(beta (m - tdpo_alpha (K_l - sg(K_w))))`, sg without a gradient."""
    chosen_kl_P, rejected_kl_P = _divergences(rows)
    offset_P = options.tdpo_alpha * (rejected_kl_P - chosen_kl_P.detach())
    return _tdpo(rows, options, chosen_kl_P, rejected_kl_P, offset_P)


def confpo(rows: Rows, options: LossOptions) -> LossAndMetrics:
    """ConfPO (arXiv 2506.08712): SimPO over the tokens of which the policy is unsure,
    `-log sigmoid(beta (mean_w logp - mean_l logp) - simpo_gamma)`; a side's mean is taken over the tokens whose
    probability lies below the side's mean probability, chosen without a gradient. A pair in which a side has no such
    token (all equally likely) weighs 0, as in the published code."""
    sides = [_mean_of_unsure(weight_PR, rows.logp_R.double()) for weight_PR in (rows.chosen_PR, rows.rejected_PR)]
    (chosen_P, chosen_share_P), (rejected_P, rejected_share_P) = sides
    reward_P = options.beta * chosen_P, options.beta * rejected_P
    loss_P = -F.logsigmoid(reward_P[0] - reward_P[1] - options.simpo_gamma)
    both_P = (chosen_share_P > 0) & (rejected_share_P > 0)
    shares = {"confpo/chosen_tokens": mean(chosen_share_P), "confpo/rejected_tokens": mean(rejected_share_P)}
    return rows.total(both_P * loss_P), side_metrics(*reward_P) | shares


def _divergences(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    assert rows.kl_R is not None
    kl_R = rows.kl_R.double()
    return rows.chosen_PR @ kl_R, rows.rejected_PR @ kl_R


def _tdpo(
    rows: Rows, options: LossOptions, chosen_kl_P: torch.Tensor, rejected_kl_P: torch.Tensor, offset_P: torch.Tensor
) -> LossAndMetrics:
    chosen_P, rejected_P = rows.log_ratios()
    loss = rows.total(-F.logsigmoid(options.beta * (chosen_P - rejected_P - offset_P)))
    divergences = {"kl/chosen": mean(chosen_kl_P), "kl/rejected": mean(rejected_kl_P)}
    return loss, side_metrics(options.beta * chosen_P, options.beta * rejected_P) | divergences


def _mean_of_unsure(weight_PR: torch.Tensor, logp_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted mean log-probability over a side's tokens of low probability, and their share of its weight."""
    (pair_E, row_E), weight_E = weight_PR.indices(), weight_PR.values()
    total_P = (weight_PR @ torch.ones_like(logp_R)).clamp_min(torch.finfo(torch.float64).tiny)
    probability_R = logp_R.detach().exp()
    threshold_P = weight_PR @ probability_R / total_P
    unsure_E = weight_E * (probability_R[row_E] < threshold_P[pair_E])
    unsure_PR = torch.sparse_coo_tensor(
        weight_PR.indices(), unsure_E, weight_PR.shape, is_coalesced=True, check_invariants=False
    )
    share_P = unsure_PR @ torch.ones_like(logp_R) / total_P
    return unsure_PR @ logp_R / (share_P * total_P).where(share_P > 0, 1.0), share_P
