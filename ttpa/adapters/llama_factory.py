"""Token-level preference loss in the shape of LLaMA-Factory's CustomDPOTrainer: padded batches, chosen half first.

Its `concatenated_forward` sums log-probabilities, for the policy and for the reference; its `compute_preference_loss`
takes the four sums. docs/adapters.md has the subclass that puts these two functions there.
"""

from __future__ import annotations

import torch

from ttpa.adapters.sums import pair_loss, weighted_sums
from ttpa.losses import LossType

IGNORED = -100


def batch_logps(
    logits_BSV: torch.Tensor, labels_BS: torch.Tensor, weights_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of `get_batch_logps`: of each of B sequences the weighted sum of its labels' log-probabilities in nats
    (fp64, with gradient) and the number of its labels. `logits [B, S, V]` stand one before the label that they predict,
    labels `[B, S]` are -100 where nothing is trained, weights `[B, S]` are those of the labels. One sequence at a time
    meets the vocabulary in fp32. `s_b = sum_t w_bt log softmax(logits_b,t-1)[label_bt]`."""
    counted_BS = labels_BS[:, 1:] != IGNORED
    weights_BS = weights_BS[:, 1:] * counted_BS
    targets_BS = labels_BS[:, 1:].masked_fill(~counted_BS, 0)
    logp_BS = torch.stack(
        [
            -torch.nn.functional.cross_entropy(logits_SV[:-1].float(), targets_S, reduction="none")
            for logits_SV, targets_S in zip(logits_BSV, targets_BS, strict=True)
        ]
    )
    return weighted_sums(logp_BS, weights_BS), counted_BS.sum(dim=1)


def preference_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    *,
    beta: float,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In place of `compute_preference_loss`: losses and the rewards of both sides, `[P]` each, from weighted sums `[P]`
    in nats (`batch_logps`). The caller takes the mean of the losses: each of them is that mean. Rewards carry no
    gradient. The loss and its errors are those of `ttpa.losses.token_dpo_loss`."""
    loss, chosen_reward_P, rejected_reward_P = pair_loss(
        chosen_P=policy_chosen_logps,
        rejected_P=policy_rejected_logps,
        ref_chosen_P=reference_chosen_logps,
        ref_rejected_P=reference_rejected_logps,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
    )
    return loss.repeat(len(chosen_reward_P)), chosen_reward_P, rejected_reward_P
