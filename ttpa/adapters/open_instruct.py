"""Token-level preference loss in the shape of open-instruct: sequences packed one after the other, chosen ones first.

Its cache of reference log-probabilities holds one number per sequence: make it with `packed_logps`, the same weights.
"""

from __future__ import annotations

import torch

from ttpa.adapters.sums import pair_loss
from ttpa.losses import LossType


def packed_logps(
    logp_T: torch.Tensor, weight_T: torch.Tensor, cu_seq_lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sums `[P]` (fp64, with gradient) of the chosen and of the rejected side of P pairs from the
    log-probability in nats and the weight `[T]` of each packed token itself, at its own place: `s_q = sum w_t logp_t`
    over `cu_seq_lens[q] <= t < cu_seq_lens[q + 1]`. Sequence p is the chosen side of pair p, sequence P + p its
    rejected side. Tokens of weight 0 (prompts, the first token of a sequence, padding behind the last one) do not
    count, whatever stands there. Raises ValueError for an odd number of sequences."""
    if len(cu_seq_lens) % 2 == 0:
        raise ValueError(
            f"{len(cu_seq_lens) - 1} sequences are no pairs: the chosen ones come first, then the rejected"
        )
    weighted_T = weight_T.double() * logp_T.double().masked_fill(weight_T == 0, 0.0)
    sums_Q = torch.segment_reduce(weighted_T, "sum", offsets=cu_seq_lens.long(), initial=0.0, unsafe=True)
    chosen_P, rejected_P = sums_Q.chunk(2)
    return chosen_P, rejected_P


def packed_dpo_loss(
    logp_T: torch.Tensor,
    weight_T: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    *,
    beta: float,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In place of the forward's sums and `dpo_utils.compute_loss`: losses and the rewards of both sides, `[P]` each,
    from packed log-probabilities (`packed_logps`) and the reference's sums `[P]`. The caller takes the mean of the
    losses: each of them is that mean. The loss and its errors are those of `ttpa.losses.token_dpo_loss`."""
    chosen_P, rejected_P = packed_logps(logp_T, weight_T, cu_seq_lens)
    loss, chosen_reward_P, rejected_reward_P = pair_loss(
        chosen_P=chosen_P,
        rejected_P=rejected_P,
        ref_chosen_P=reference_chosen_logps,
        ref_rejected_P=reference_rejected_logps,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
    )
    return loss.repeat(len(chosen_P)), chosen_reward_P, rejected_reward_P
