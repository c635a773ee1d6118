"""What all adapters share: margins are linear, so a weighted sum of log-probabilities per sequence is all they take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from ttpa_kernels.token_dpo.pairs import PairMatrix

from ttpa.losses import LossType, token_dpo_loss


class PairLoss(NamedTuple):
    """The mean loss over the pairs, with gradient, and each side's reward of each of P pairs, fp64, without."""

    loss: torch.Tensor
    chosen_reward_P: torch.Tensor
    rejected_reward_P: torch.Tensor


def weighted_sums(logp_BT: torch.Tensor, weight_BT: torch.Tensor) -> torch.Tensor:
    """`s_b = sum_t weight_bt logp_bt`, fp64 `[B]`, differentiable in `logp_BT [B, T]` (nats). Tokens of weight 0 do not
    count, whatever stands there."""
    return (weight_BT.double() * logp_BT.double().masked_fill(weight_BT == 0, 0.0)).sum(dim=1)


def pair_loss(
    *,
    chosen_P: torch.Tensor,
    rejected_P: torch.Tensor,
    ref_chosen_P: torch.Tensor,
    ref_rejected_P: torch.Tensor,
    beta: float,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
) -> PairLoss:
    """`token_dpo_loss` of P pairs from sums of log-probabilities in nats, `[P]` each, of the policy (with gradient) and
    of the reference: `mean_p f(beta m_p)`, `m_p = (chosen_p - ref_chosen_p) - (rejected_p - ref_rejected_p)`.

    With token weights w each sum is `sum_t w_t logp_t`, of policy and reference alike (`weighted_sums`): the sums are
    the head rows of `token_dpo_loss`, and C is +1 and -1. Rewards are `beta * (sum - reference sum)`. The functions f
    and the errors are those of `token_dpo_loss`.
    """
    num_pairs = len(chosen_P)
    index = torch.stack([torch.arange(num_pairs).repeat(2), torch.arange(2 * num_pairs)])
    sign_R = torch.ones(2 * num_pairs, dtype=torch.float64)
    sign_R[num_pairs:] = -1
    C = torch.sparse_coo_tensor(index, sign_R, (num_pairs, 2 * num_pairs), check_invariants=True)
    logp_R, ref_logp_R = torch.cat([chosen_P, rejected_P]), torch.cat([ref_chosen_P, ref_rejected_P]).detach()
    loss, _ = token_dpo_loss(
        logp_R=logp_R,
        ref_logp_R=ref_logp_R,
        C=PairMatrix.from_sparse(C).to(logp_R.device),
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
    )
    return PairLoss(loss, *(beta * (logp_R.detach().double() - ref_logp_R.double())).chunk(2))
