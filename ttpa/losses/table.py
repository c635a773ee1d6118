"""The losses by name: what each one needs, and what it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ttpa.config import nearest
from ttpa.errors import InputError
from ttpa.losses import likelihood, margin, sides, weights
from ttpa.losses.options import LossOptions
from ttpa.losses.rows import LossAndMetrics, Rows
from ttpa.losses.weights import PairTokens
from ttpa.trees.pack import PairWeights

LossName = Literal[
    "sigmoid",
    "ttpa",
    "robust",
    "hinge",
    "ipo",
    "simpo",
    "ld_dpo",
    "d2po",
    "tis",
    "tgdpo",
    "sepo",
    "confpo",
    "tdpo1",
    "tdpo2",
    "nca_pair",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "likelihood",
]
Leaves = Literal["pairs", "chosen", "all"]
ALIASES = {"dpo": "sigmoid"}


@dataclass(frozen=True)
class Loss:
    """What a loss needs and what it is made of.

    `value` is the loss of a pack's rows, `weigh` gives the static weights of a pair's tokens, `options` names the
    LossOptions that it reads. `reference`: log-probabilities of the reference for each target ("logps"), for the whole
    vocabulary ("distribution"), or none. `sides`: shared tokens are trained even where both sides give them the same
    weight. `leaves`: what is packed, all leaves of pairs, those that some pair prefers, or each leaf on its own.
    `scores`: token scores of a helper model. `per`: what the loss is divided by, pairs, total chosen weight, or trees
    (a tree is then not split). `base`: the token weights that it starts from unless told otherwise.
    """

    value: Callable[[Rows, LossOptions], LossAndMetrics]
    options: tuple[str, ...] = ("beta",)
    weigh: Callable[[PairTokens], PairWeights] = weights.as_given
    reference: Literal["none", "logps", "distribution"] = "logps"
    sides: bool = False
    leaves: Leaves = "pairs"
    scores: bool = False
    per: Literal["pair", "token", "tree"] = "pair"
    base: Literal["errors", "ones"] = "ones"


DPO = ("beta", "label_smoothing")
TIS = ("tis_mu", "tis_min", "tis_max")
LOSSES: dict[LossName, Loss] = {
    "sigmoid": Loss(margin.sigmoid, DPO),
    "ttpa": Loss(margin.sigmoid, DPO, base="errors"),
    "robust": Loss(margin.robust, DPO),
    "hinge": Loss(margin.hinge),
    "ipo": Loss(margin.ipo, weigh=weights.mean),
    "simpo": Loss(margin.simpo, (*DPO, "simpo_gamma"), weigh=weights.mean, reference="none"),
    "ld_dpo": Loss(margin.sigmoid, (*DPO, "ld_alpha"), weigh=weights.length_desensitised),
    "d2po": Loss(margin.sigmoid, (*DPO, "d2po_gamma"), weigh=weights.temporal_decay),
    "tis": Loss(margin.sigmoid, (*DPO, *TIS), weigh=weights.importance, scores=True),
    "tgdpo": Loss(margin.sigmoid, (*DPO, "tgdpo_alpha"), weigh=weights.reward_guided, scores=True),
    "sepo": Loss(margin.sigmoid, (*DPO, "sepo_ratio"), weigh=weights.selected, reference="none", scores=True),
    "confpo": Loss(sides.confpo, ("beta", "simpo_gamma"), reference="none", sides=True),
    "tdpo1": Loss(sides.tdpo1, reference="distribution", sides=True),
    "tdpo2": Loss(sides.tdpo2, ("beta", "tdpo_alpha"), reference="distribution", sides=True),
    "nca_pair": Loss(sides.nca_pair, sides=True),
    "apo_zero": Loss(sides.apo_zero, sides=True),
    "apo_down": Loss(sides.apo_down, sides=True),
    "discopop": Loss(margin.discopop, ("beta", "discopop_tau")),
    "sft": Loss(margin.sft, (), weigh=weights.once, reference="none", leaves="chosen", per="token"),
    "likelihood": Loss(
        likelihood.likelihood,
        ("likelihood_temperature",),
        weigh=weights.leaf_mean,
        reference="none",
        leaves="all",
        per="tree",
    ),
}
assert set(LOSSES) == set(get_args(LossName))


@dataclass(frozen=True)
class LossTerm:
    """One of the losses that a run adds up, and what it is multiplied with."""

    name: str
    weight: float = 1.0


def describe(name: str) -> Loss:
    """The loss of a name or an alias; raises InputError for another name, and says which one is nearest."""
    loss = {str(known): loss for known, loss in LOSSES.items()}.get(ALIASES.get(name, name))
    if loss is None:
        close = nearest(name, [*LOSSES, *ALIASES])
        hint = f"did you mean {close}?" if close else f"choose of {', '.join([*LOSSES, *ALIASES])}"
        raise InputError(f"--loss_type: there is no loss {name!r}; {hint}")
    return loss


def loss_terms(loss_type: str, loss_weights: str | None = None, *, options: LossOptions) -> list[LossTerm]:
    """The terms of `--loss_type ttpa,sft --loss_weights 1,20` (None: all weights 1); raises InputError for an unknown
    or repeated name, for weights that are not as many finite numbers above 0, for terms that cannot be trained
    together, and for a `label_smoothing` that no term reads."""
    names = [name.strip() for name in loss_type.split(",")]
    texts = ["1"] * len(names) if loss_weights is None else loss_weights.split(",")
    if len(texts) != len(names):
        raise InputError(f"--loss_weights has {len(texts)} numbers for {len(names)} losses in --loss_type {loss_type}")
    terms = [LossTerm(ALIASES.get(name, name), _weight(text)) for name, text in zip(names, texts, strict=True)]
    packed_leaves(terms)
    if len({term.name for term in terms}) < len(terms):
        raise InputError(f"--loss_type {loss_type} has a loss twice: name it once and give it a --loss_weights")
    if options.label_smoothing and not any("label_smoothing" in describe(term.name).options for term in terms):
        smooth = ", ".join(name for name, loss in LOSSES.items() if "label_smoothing" in loss.options)
        raise InputError(f"--label_smoothing goes with {smooth}, not with {loss_type}")
    return terms


def packed_leaves(terms: Sequence[LossTerm]) -> Leaves:
    """The leaves that a run with these terms packs; raises InputError where a term that takes each leaf on its own
    stands beside another, and for an unknown name."""
    kinds = {term.name: describe(term.name).leaves for term in terms}
    if len(kinds) > 1 and "all" in kinds.values():
        alone = next(name for name, leaves in kinds.items() if leaves == "all")
        others = ", ".join(name for name in kinds if name != alone)
        raise InputError(f"--loss_type: {alone} takes every leaf on its own and cannot be added to {others}")
    return "pairs" if "pairs" in kinds.values() else next(iter(kinds.values()))


def start_loss(name: str, options: LossOptions) -> float | None:
    """The loss per pair when policy and reference are equal and no `margin_P` is given; None where it depends on the
    model."""
    if describe(name).reference == "none":
        return None
    ln_2 = math.log(2)
    others = {
        "hinge": 1.0,
        "ipo": 1 / (2 * options.beta) ** 2,
        "nca_pair": 2 * ln_2,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "discopop": (ln_2 + 1) / 2,
    }
    return others.get(name, ln_2)


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(f"--loss_weights: {text.strip()!r} is not a number above 0")
    return weight
