"""The losses: margins from one sparse matrix, and a function of each margin."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from ttpa_kernels import linear_logp

LossType = Literal["sigmoid", "robust", "hinge", "ipo"]


def token_dpo_loss(
    *,
    logp_R: torch.Tensor,
    ref_logp_R: torch.Tensor,
    C: torch.Tensor,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    margin_P: torch.Tensor | None = None,
    pair_weight_P: torch.Tensor | None = None,
    denominator: float | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Preference loss `sum_p u_p f(beta m_p + gamma_p) / denominator` with margins `m = C @ (logp - ref_logp)`.

    `logp_R` (with grad) and `ref_logp_R` are log-probabilities in nats, `C [P, R]` (sparse, from `pack_trees`) the
    coefficient of each row in each pair, `margin_P` the gamma and `pair_weight_P` the u of each pair (0 and 1 when
    None). f is `-log sigmoid(x)` for sigmoid (DPO, arXiv 2305.18290 eq. 7), with label smoothing e
    `-(1 - e) log sigmoid(x) - e log sigmoid(-x)` (conservative DPO);
    `(-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2e)` for robust (arXiv 2403.00409; what TRL's
    `label_smoothing` means); `max(0, 1 - x)` for hinge (SLiC, arXiv 2305.10425); and `((x - 1/2) / beta)^2` for ipo
    (arXiv 2310.12036 eq. 17; use `pack_trees(average=True)` as TRL does).
    `denominator` defaults to P; give the number of pairs of the whole optimizer step when gradients accumulate, so
    that the result does not depend on how a batch is cut. Computed in float64, so that equal models give ln 2 to the
    last bit; returns the loss in float32 and the metrics `rewards/weighted_margins` (mean of beta m) and
    `rewards/weighted_accuracies`. The gradient is `dlogp = C^T (u f' beta) / denominator`. Raises ValueError for an
    unknown loss type, for label smoothing outside [0, 0.5) or with hinge or ipo, and for shapes that do not fit.
    """
    if logp_R.shape != C.shape[1:] or ref_logp_R.shape != C.shape[1:]:
        raise ValueError(
            f"C has {C.shape[1]} rows' coefficients, logp_R is {tuple(logp_R.shape)} and ref_logp_R is "
            f"{tuple(ref_logp_R.shape)}: give the trained rows only (the first batch.num_trained)"
        )
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type in ("hinge", "ipo")):
        raise ValueError(
            f"label_smoothing is {label_smoothing} with loss_type={loss_type!r}: it lies in [0, 0.5) and goes with "
            "sigmoid and robust"
        )
    reward_P = beta * (C.double() @ (logp_R.double() - ref_logp_R.detach().double()))
    x_P = reward_P if margin_P is None else reward_P + margin_P
    if loss_type == "sigmoid":
        loss_P = -(1 - label_smoothing) * F.logsigmoid(x_P) - label_smoothing * F.logsigmoid(-x_P)
    elif loss_type == "robust":
        flipped_P = label_smoothing * F.logsigmoid(-x_P)
        loss_P = (flipped_P - (1 - label_smoothing) * F.logsigmoid(x_P)) / (1 - 2 * label_smoothing)
    elif loss_type == "hinge":
        loss_P = torch.relu(1 - x_P)
    elif loss_type == "ipo":
        loss_P = ((x_P - 0.5) / beta) ** 2
    else:
        raise ValueError(f"loss_type is {loss_type!r}, not one of sigmoid, robust, hinge, ipo")
    if pair_weight_P is not None:
        loss_P = loss_P * pair_weight_P
    loss = loss_P.sum() / (C.shape[0] if denominator is None else denominator)
    metrics = {
        "rewards/weighted_margins": reward_P.detach().mean().item(),
        "rewards/weighted_accuracies": (reward_P.detach() > 0).double().mean().item(),
    }
    return loss.float(), metrics


def linear_token_dpo_loss(
    *,
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_R: torch.Tensor,
    ref_logp_R: torch.Tensor,
    C: torch.Tensor,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    margin_P: torch.Tensor | None = None,
    pair_weight_P: torch.Tensor | None = None,
    denominator: float | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """`token_dpo_loss` from the head's input: `logp_R = linear_logp(hidden_RH, weight_VH, target_R)`.

    Differentiable in both; no `[R, V]` matrix of logits is built. The other arguments, the result and the errors are
    those of `token_dpo_loss`.
    """
    return token_dpo_loss(
        logp_R=linear_logp(hidden_RH, weight_VH, target_R),
        ref_logp_R=ref_logp_R,
        C=C,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        margin_P=margin_P,
        pair_weight_P=pair_weight_P,
        denominator=denominator,
    )


def pair_metrics(
    *,
    logp_R: torch.Tensor,
    ref_logp_R: torch.Tensor,
    chosen_PR: torch.Tensor,
    rejected_PR: torch.Tensor,
    beta: float = 0.1,
) -> dict[str, float]:
    """TRL's preference metrics over whole completions, unweighted: means over the pairs.

    Log-probabilities are those of all rows, trained and reported; `chosen_PR` and `rejected_PR` come from the
    `TreeBatch`. `logps/*` are sums over a completion in nats, `rewards/*` are `beta * (logps - reference logps)`.
    """
    logp_R, ref_logp_R = logp_R.detach().double(), ref_logp_R.detach().double()
    chosen_P, rejected_P = chosen_PR @ logp_R, rejected_PR @ logp_R
    chosen_reward_P = beta * (chosen_P - chosen_PR @ ref_logp_R)
    rejected_reward_P = beta * (rejected_P - rejected_PR @ ref_logp_R)
    means = torch.stack(
        [
            chosen_reward_P,
            rejected_reward_P,
            chosen_reward_P - rejected_reward_P,
            (chosen_reward_P > rejected_reward_P).double(),
            chosen_P,
            rejected_P,
        ]
    ).mean(dim=1)
    names = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"]
    return dict(zip([*names, "logps/rejected"], means.tolist(), strict=True))
