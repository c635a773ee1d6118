"""The losses, each a choice of token weights and of a function of them.

`token_weights` gives the weights of a pair's tokens before a model is run, `preference_loss` the loss of a pack from
log-probabilities; `describe` says what a loss needs. For other trainers: `token_dpo_loss`, `linear_token_dpo_loss` and
`pair_metrics`.
"""

from ttpa.losses.options import LossOptions
from ttpa.losses.preference import preference_loss, token_weights
from ttpa.losses.table import (
    ALIASES,
    LOSSES,
    Leaves,
    Loss,
    LossName,
    LossTerm,
    describe,
    loss_terms,
    packed_leaves,
    start_loss,
)
from ttpa.losses.token_dpo import LossType, linear_token_dpo_loss, pair_metrics, token_dpo_loss

__all__ = [
    "ALIASES",
    "LOSSES",
    "Leaves",
    "Loss",
    "LossName",
    "LossOptions",
    "LossTerm",
    "LossType",
    "describe",
    "linear_token_dpo_loss",
    "loss_terms",
    "packed_leaves",
    "pair_metrics",
    "preference_loss",
    "start_loss",
    "token_dpo_loss",
    "token_weights",
]
