"""Loss and gradient of one pack."""

from __future__ import annotations

from typing import cast

import torch
from transformers import PreTrainedModel
from ttpa_kernels.token_dpo.pairs import PairMatrix

from ttpa.losses import LossType, pair_metrics, token_dpo_loss
from ttpa.model import packed_logps
from ttpa.training.config import TrainConfig
from ttpa.trees.pack import TreeBatch


def backward(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    pack: TreeBatch,
    *,
    config: TrainConfig,
    denominator: float,
    num_chosen_rows: int,
) -> dict[str, float]:
    """Add the gradient of one pack to the policy's and return its part of the optimizer step's metrics.

    `denominator` is that of the whole step: the sum of the parts over the packs of a step is the step's metrics, and
    both they and the gradient do not depend on how the step is cut into packs. `reference` is None for `sft`, whose
    loss is `-sum logp / denominator` over the chosen tokens that the model wrote.
    """
    pairs = PairMatrix.from_sparse(pack.C).to(policy.device)  # read where the pack was made: on the CPU
    pack = pack.to(policy.device)
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=config.bf16):
        logp_R = packed_logps(policy, pack, report=reference is not None)
        if reference is not None:
            with torch.no_grad():
                ref_logp_R = packed_logps(reference, pack)
    if reference is None:
        loss = -(pack.C @ logp_R.double()).sum() / denominator
        loss.backward()
        return {"loss": loss.item()}
    trained = slice(0, pack.num_trained)
    loss, weighted = token_dpo_loss(
        logp_R=logp_R[trained],
        ref_logp_R=ref_logp_R[trained],
        C=pairs,
        beta=config.beta,
        loss_type=cast(LossType, config.loss_type),
        label_smoothing=config.label_smoothing,
        denominator=denominator,
    )
    nll = -logp_R[pack.chosen_rows].double().sum() / max(num_chosen_rows, 1)
    (loss + config.sft_weight * nll).backward()
    means = pair_metrics(
        logp_R=logp_R,
        ref_logp_R=ref_logp_R,
        chosen_PR=pack.chosen_PR,
        rejected_PR=pack.rejected_PR,
        beta=config.beta,
    )
    share = len(pack.pairs) / denominator
    losses = {"loss/preference": loss.item(), "loss/sft": nll.item()}
    losses["loss"] = losses["loss/preference"] + config.sft_weight * losses["loss/sft"]
    return {**losses, **{name: mean * share for name, mean in (means | weighted).items()}}
