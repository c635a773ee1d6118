"""The loss of pairs for other trainers: margins from one sparse matrix, and a function of each margin."""

from __future__ import annotations

import torch
from ttpa_kernels.linear_token_dpo.op import HeadMargins, linear_token_dpo
from ttpa_kernels.token_dpo.op import Margins, token_dpo
from ttpa_kernels.token_dpo.pairs import PairMatrix
from ttpa_kernels.token_dpo.segments import LossType


def token_dpo_loss(
    *,
    logp_R: torch.Tensor,
    ref_logp_R: torch.Tensor,
    C: torch.Tensor | PairMatrix,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    margin_P: torch.Tensor | None = None,
    pair_weight_P: torch.Tensor | None = None,
    denominator: float | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Preference loss `sum_p u_p f(beta m_p + gamma_p) / denominator` with margins `m = C @ (logp - ref_logp)`.

    `logp_R` (with grad) and `ref_logp_R` are log-probabilities in nats, `C [P, R]` (sparse, from `pack_trees`, or read
    once by `PairMatrix.from_sparse`) the coefficient of each row in each pair, `margin_P` the gamma and
    `pair_weight_P` the u of each pair (0 and 1 when None). f is `-log sigmoid(x)` for sigmoid (DPO, arXiv 2305.18290
    eq. 7), with label smoothing e `-(1 - e) log sigmoid(x) - e log sigmoid(-x)` (conservative DPO);
    `(-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2e)` for robust (arXiv 2403.00409; what TRL's
    `label_smoothing` means); `max(0, 1 - x)` for hinge (SLiC, arXiv 2305.10425); `((x - 1/2) / beta)^2` for ipo
    (arXiv 2310.12036 eq. 17; TRL's needs coefficients that are means over each side); and `-x` for linear (with beta 1:
    weighted likelihood). `denominator` defaults to P; give the number of pairs of the whole optimizer step when
    gradients accumulate, so that the result does not depend on how a batch is cut. Computed in float64, so that equal
    models give ln 2 to the last bit; returns the loss in float32 and the metrics `rewards/weighted_margins` (mean of
    beta m) and `rewards/weighted_accuracies`, for which the CPU waits; `ttpa_kernels.token_dpo` leaves them on the
    device. The gradient is `dlogp = C^T (u f' beta) / denominator`. Raises ValueError for an unknown loss type, for
    label smoothing outside [0, 0.5) or with a loss that has none, and for shapes that do not fit.
    """
    pairs = _pairs(C, logp_R, ref_logp_R)
    loss, margins = token_dpo(
        logp_R=logp_R,
        ref_logp_R=ref_logp_R,
        pairs=pairs,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        margin_P=margin_P,
        pair_weight_P=pair_weight_P,
        denominator=denominator,
    )
    return loss.float(), _metrics(margins)


def linear_token_dpo_loss(
    *,
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_R: torch.Tensor,
    ref_logp_R: torch.Tensor,
    C: torch.Tensor | PairMatrix,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    margin_P: torch.Tensor | None = None,
    pair_weight_P: torch.Tensor | None = None,
    denominator: float | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """`token_dpo_loss` from the head's input: `logp_R = linear_logp(hidden_RH, weight_VH, target_R)`.

    Differentiable (once) in both; no `[R, V]` matrix of logits is built, and rows without a coefficient never meet
    the vocabulary. The other arguments, the result and the errors are those of `token_dpo_loss`.
    """
    loss, margins = linear_token_dpo(
        hidden_RH=hidden_RH,
        weight_VH=weight_VH,
        target_R=target_R,
        ref_logp_R=ref_logp_R,
        pairs=_pairs(C, target_R, ref_logp_R),
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        margin_P=margin_P,
        pair_weight_P=pair_weight_P,
        denominator=denominator,
    )
    return loss.float(), _metrics(margins)


def _pairs(C: torch.Tensor | PairMatrix, given_R: torch.Tensor, ref_logp_R: torch.Tensor) -> PairMatrix:
    """The coefficients as kernels read them; the rows that are given are those of C."""
    num_rows = C.num_rows if isinstance(C, PairMatrix) else C.shape[1]
    if len(given_R) != num_rows or len(ref_logp_R) != num_rows:
        raise ValueError(
            f"C has {num_rows} rows' coefficients, {len(given_R)} rows and {len(ref_logp_R)} reference "
            "log-probabilities are given: give the trained rows only (the first batch.num_trained)"
        )
    return C if isinstance(C, PairMatrix) else PairMatrix.from_sparse(C)


def _metrics(margins: Margins | HeadMargins) -> dict[str, float]:
    mean_reward, accuracy = torch.stack([margins.mean_reward, margins.accuracy]).tolist()
    return {"rewards/weighted_margins": mean_reward, "rewards/weighted_accuracies": accuracy}


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
