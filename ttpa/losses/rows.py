"""What a loss sees of a pack, and the metrics that losses have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ttpa_kernels.token_dpo.pairs import PairMatrix

Metrics = dict[str, torch.Tensor]
LossAndMetrics = tuple[torch.Tensor, Metrics]


@dataclass(frozen=True)
class Rows:
    """The trained rows of a pack and their weights in each pair, see `preference_loss`."""

    logp_R: torch.Tensor
    ref_logp_R: torch.Tensor | None
    chosen_PR: torch.Tensor
    rejected_PR: torch.Tensor
    C: torch.Tensor | PairMatrix | None
    kl_R: torch.Tensor | None
    tree_P: torch.Tensor | None
    margin_P: torch.Tensor | None
    pair_weight_P: torch.Tensor | None
    denominator: float

    @property
    def pairs(self) -> PairMatrix:
        """Chosen weights less rejected weights, as kernels read them."""
        if isinstance(self.C, PairMatrix):
            return self.C
        return PairMatrix.from_sparse(self.chosen_PR - self.rejected_PR if self.C is None else self.C)

    @property
    def log_ratio_R(self) -> torch.Tensor:
        """`logp - ref_logp`, fp64."""
        assert self.ref_logp_R is not None
        return self.logp_R.double() - self.ref_logp_R.detach()

    def log_ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted sums of `logp - ref_logp` over the chosen and over the rejected side of each pair."""
        return self.chosen_PR @ self.log_ratio_R, self.rejected_PR @ self.log_ratio_R

    def total(self, loss_P: torch.Tensor) -> torch.Tensor:
        """`sum_p u_p loss_p / denominator`."""
        return (loss_P if self.pair_weight_P is None else self.pair_weight_P * loss_P).sum() / self.denominator


def mean(value_P: torch.Tensor) -> torch.Tensor:
    """The mean over the pairs, without a gradient; 0 where there are none."""
    return value_P.detach().double().sum() / max(len(value_P), 1)


def margin_metrics(reward_P: torch.Tensor) -> Metrics:
    """The mean reward margin, and how often it is above 0."""
    return {"rewards/weighted_margins": mean(reward_P), "rewards/weighted_accuracies": mean(reward_P > 0)}


def side_metrics(chosen_P: torch.Tensor, rejected_P: torch.Tensor) -> Metrics:
    """The mean reward of either side, and what `margin_metrics` says of their difference."""
    sides = {"rewards/weighted_chosen": mean(chosen_P), "rewards/weighted_rejected": mean(rejected_P)}
    return sides | margin_metrics(chosen_P - rejected_P)
