"""The slow twins: every loss as a loop over completions, token by token, without packs and matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ttpa.losses import LossOptions
from ttpa.trees.record import PreferenceTree


@dataclass
class Token:
    """`node` and `offset` say where it stands in its tree; the log-probabilities and the divergence are fp64."""

    node: int
    offset: int
    logp: torch.Tensor
    ref: torch.Tensor
    kl: torch.Tensor
    score: float
    written: bool
    weight: float = 1.0


Side = list[Token]


def completion(tree: PreferenceTree, leaf: int, values: dict[str, torch.Tensor], start: int) -> Side:
    """The tokens of one completion; `values` hold one number for each completion token of all trees, those of this
    tree from `start` on."""
    tokens = []
    for node in tree.path(leaf):
        first = start + sum(len(before.ids) for before in tree.nodes[:node])
        trained = tree.nodes[node].trained or [1] * len(tree.nodes[node].ids)
        for offset, written in enumerate(trained):
            found = {name: value[first + offset] for name, value in values.items()}
            score = float(found.pop("score"))
            tokens.append(Token(node, offset, **found, score=score, written=bool(written), weight=float(written)))
    return tokens


def log_sigmoid(x):
    return -torch.log(1 + torch.exp(-x))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def ratio(side: Side):
    """The weighted sum of log-ratios."""
    return sum(t.weight * (t.logp - t.ref) for t in side)


def mean_logp(side: Side):
    return sum(t.weight * t.logp for t in side) / sum(t.weight for t in side)


def divergence(side: Side):
    return sum(t.weight * t.kl for t in side)


def smoothed(x, o: LossOptions):
    return -(1 - o.label_smoothing) * log_sigmoid(x) - o.label_smoothing * log_sigmoid(-x)


def log_ratio_modulated(x, o: LossOptions):
    share = sigmoid(x / o.discopop_tau)
    return -(1 - share) * log_sigmoid(x) + share * torch.exp(-x)


def reweighted(side: Side, factor: Callable[[int, Token], float]) -> Side:
    """The tokens with their weights times `factor(number of tokens that the model wrote before, token)`."""
    before = [sum(t.written for t in side[:i]) for i in range(len(side))]
    return [replace(t, weight=t.weight * factor(n, t)) for n, t in zip(before, side, strict=True)]


def dpo(c, r, o):
    return smoothed(o.beta * (ratio(c) - ratio(r)), o)


def robust(c, r, o):
    x, e = o.beta * (ratio(c) - ratio(r)), o.label_smoothing
    return (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e)


def hinge(c, r, o):
    return torch.clamp(1 - o.beta * (ratio(c) - ratio(r)), min=0)


def ipo(c, r, o):
    means = [ratio(side) / sum(t.weight for t in side) for side in (c, r)]
    return (means[0] - means[1] - 1 / (2 * o.beta)) ** 2


def simpo(c, r, o):
    return smoothed(o.beta * (mean_logp(c) - mean_logp(r)) - o.simpo_gamma, o)


def ld_dpo(c, r, o):
    shared = min(sum(t.written for t in side) for side in (c, r))
    return dpo(*(reweighted(side, lambda n, t: 1 if n < shared else o.ld_alpha) for side in (c, r)), o)


def d2po(c, r, o):
    return dpo(*(reweighted(side, lambda n, t: o.d2po_gamma**n) for side in (c, r)), o)


def tis(c, r, o):
    def clamp(x):
        return min(max(x, o.tis_min), o.tis_max)

    chosen = reweighted(c, lambda n, t: math.exp(o.tis_mu * clamp(t.score)))
    return dpo(chosen, reweighted(r, lambda n, t: math.exp(-o.tis_mu * clamp(t.score))), o)


def tgdpo(c, r, o):
    chosen = reweighted(c, lambda n, t: 1 + o.tgdpo_alpha * o.beta * t.score)
    return dpo(chosen, reweighted(r, lambda n, t: 1 - o.tgdpo_alpha * o.beta * t.score), o)


def sepo(c, r, o):
    best, worst = ([t for t in side if t.weight > 0] for side in (c, r))
    best = sorted(best, key=lambda t: -t.score)[: max(1, int(o.sepo_ratio * len(best)))]
    worst = sorted(worst, key=lambda t: t.score)[: max(1, int(o.sepo_ratio * len(worst)))]
    return smoothed(o.beta * (mean_logp(best) - mean_logp(worst)), o)


def confpo(c, r, o):
    unsure = []
    for side in (c, r):
        probability = [math.exp(t.logp.item()) for t in side]
        threshold = sum(t.weight * p for t, p in zip(side, probability, strict=True)) / sum(t.weight for t in side)
        unsure.append([t for t, p in zip(side, probability, strict=True) if p < threshold and t.weight > 0])
    if not all(unsure):
        return 0.0 * c[0].logp
    return -log_sigmoid(o.beta * (mean_logp(unsure[0]) - mean_logp(unsure[1])) - o.simpo_gamma)


def tdpo1(c, r, o):
    return -log_sigmoid(o.beta * (ratio(c) - ratio(r) - (divergence(r) - divergence(c))))


def tdpo2(c, r, o):
    offset = o.tdpo_alpha * (divergence(r) - divergence(c).detach())
    return -log_sigmoid(o.beta * (ratio(c) - ratio(r) - offset))


def nca_pair(c, r, o):
    chosen, rejected = o.beta * ratio(c), o.beta * ratio(r)
    return -log_sigmoid(chosen) - log_sigmoid(-chosen) / 2 - log_sigmoid(-rejected) / 2


def apo_zero(c, r, o):
    return 1 - sigmoid(o.beta * ratio(c)) + sigmoid(o.beta * ratio(r))


def apo_down(c, r, o):
    return sigmoid(o.beta * ratio(c)) + 1 - sigmoid(o.beta * (ratio(c) - ratio(r)))


def discopop(c, r, o):
    return log_ratio_modulated(o.beta * (ratio(c) - ratio(r)), o)


def sft(chosen_sides: list[Side]):
    """Of one tree: the sum over its distinct chosen tokens, and how many these are."""
    distinct = {(t.node, t.offset): t for side in chosen_sides for t in side if t.written}
    return -sum(t.logp for t in distinct.values()), len(distinct)


def likelihood(leaves: list[Side], o: LossOptions):
    """Of one tree."""
    losses = []
    for side in leaves:
        written = [t for t in side if t.written]
        losses.append(-sum(t.logp for t in written) / len(written))
    parts = [math.exp(-loss.item() / o.likelihood_temperature) for loss in losses]
    return sum(part / sum(parts) * loss for part, loss in zip(parts, losses, strict=True))


PAIR_LOOPS = {
    "sigmoid": dpo,
    "ttpa": dpo,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "simpo": simpo,
    "ld_dpo": ld_dpo,
    "d2po": d2po,
    "tis": tis,
    "tgdpo": tgdpo,
    "sepo": sepo,
    "confpo": confpo,
    "tdpo1": tdpo1,
    "tdpo2": tdpo2,
    "nca_pair": nca_pair,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}
