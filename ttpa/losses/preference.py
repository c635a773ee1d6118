"""Every loss behind one signature: static token weights first, then the loss of a pack's rows."""

from __future__ import annotations

import torch
from ttpa_kernels.token_dpo.pairs import PairMatrix

from ttpa.errors import InputError
from ttpa.losses.options import LossOptions
from ttpa.losses.rows import LossAndMetrics, Rows
from ttpa.losses.table import describe
from ttpa.losses.weights import PairTokens
from ttpa.trees.pack import PairWeights
from ttpa.trees.record import Pair, PreferenceTree


def token_weights(
    name: str,
    *,
    tree: PreferenceTree,
    pair: Pair,
    base: PairWeights,
    options: LossOptions,
    scores: PairWeights | None = None,
) -> PairWeights:
    """The static weights of one pair's completion tokens under a loss: those of `base` (0 where the model did not write
    the token) as the loss changes them, see `ttpa.losses.weights`. `pair` is one of `tree.pairs`, `scores` what helper
    models say of each token, in nats. Raises InputError for an unknown loss, and for a loss that needs scores and has
    none."""
    loss = describe(name)
    if loss.scores and scores is None:
        raise InputError(
            f"--loss_type {name} weighs tokens by the scores of a helper model: name it with --score_model"
        )
    return loss.weigh(PairTokens(tree, pair, base, options, scores))


def preference_loss(
    name: str,
    *,
    logp_R: torch.Tensor,
    ref_logp_R: torch.Tensor | None,
    chosen_PR: torch.Tensor,
    rejected_PR: torch.Tensor,
    options: LossOptions,
    denominator: float,
    C: torch.Tensor | PairMatrix | None = None,
    kl_R: torch.Tensor | None = None,
    tree_P: torch.Tensor | None = None,
    margin_P: torch.Tensor | None = None,
    pair_weight_P: torch.Tensor | None = None,
) -> LossAndMetrics:
    """The loss of the pairs of one pack, `sum_p u_p loss_p / denominator`, and its metrics, 0-dimensional fp64 tensors
    that are means over these pairs (0 without pairs); both on the device, which nothing waits for.

    `logp_R` (with gradient) and `ref_logp_R` (None for a loss without a reference) are log-probabilities in nats of the
    trained rows, `chosen_PR` and `rejected_PR` (sparse, coalesced, fp64) the token weights of either side that
    `token_weights` gave, `C` their difference where it is known (best as a PairMatrix). `kl_R` is KL(reference ||
    policy) at the position of each row, with gradient (tdpo1, tdpo2), `tree_P` the tree of each pair (likelihood),
    `margin_P` is added to `beta m` in the losses of one margin, `pair_weight_P` is u (None: 1). `denominator` is that
    of the whole optimizer step. The loss is fp32, or fp64 where something is summed in torch or given in fp64. Raises
    InputError for an unknown name and ValueError where something is missing or does not fit; equations and sources
    stand in `margin`, `sides` and `likelihood`.
    """
    loss = describe(name)
    missing = {
        "ref_logp_R": loss.reference != "none" and ref_logp_R is None,
        "kl_R": loss.reference == "distribution" and kl_R is None,
        "tree_P": loss.per == "tree" and tree_P is None,
    }
    if any(missing.values()):
        raise ValueError(f"{name} needs {', '.join(what for what, is_missing in missing.items() if is_missing)}")
    if margin_P is not None and (loss.sides or loss.leaves != "pairs"):
        raise ValueError(f"{name} has no single margin that margin_P could be added to")
    rows = Rows(
        logp_R=logp_R,
        ref_logp_R=None if loss.reference == "none" else ref_logp_R,
        chosen_PR=chosen_PR,
        rejected_PR=rejected_PR,
        C=C,
        kl_R=kl_R,
        tree_P=tree_P,
        margin_P=margin_P,
        pair_weight_P=pair_weight_P,
        denominator=denominator,
    )
    return loss.value(rows, options)
