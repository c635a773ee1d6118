"""Static token weights: what the tokens of a pair weigh before a model is run.

A weight function takes a `PairTokens` and returns one weight for each completion token of either side. Tokens that the
model did not write have base weight 0, and no function makes more of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from ttpa.losses.options import LossOptions
from ttpa.trees.pack import PairWeights
from ttpa.trees.record import Pair, PreferenceTree


@dataclass(frozen=True)
class PairTokens:
    """One pair of a tree and what is known of its tokens: `base` weights, and `scores` of helper models if any."""

    tree: PreferenceTree
    pair: Pair
    base: PairWeights
    options: LossOptions
    scores: PairWeights | None = None

    @property
    def base_sides(self) -> tuple[np.ndarray, np.ndarray]:
        """The base weights as fp64 arrays."""
        chosen, rejected = self.base
        return np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)

    @property
    def written_sides(self) -> tuple[np.ndarray, np.ndarray]:
        """1 for each token that the model wrote, 0 elsewhere."""
        return np.array(self.tree.trained(self.pair.chosen)), np.array(self.tree.trained(self.pair.rejected))

    @property
    def score_sides(self) -> tuple[np.ndarray, np.ndarray]:
        """The scores where the base weight is not 0, and 0 elsewhere, where nobody needs to know them."""
        assert self.scores is not None
        given = (np.asarray(side, dtype=np.float64) for side in self.scores)
        chosen, rejected = (np.where(b != 0, s, 0.0) for s, b in zip(given, self.base_sides, strict=True))
        return chosen, rejected


def as_given(tokens: PairTokens) -> PairWeights:
    """The base weights."""
    return tokens.base


def mean(tokens: PairTokens) -> PairWeights:
    """Base weights divided by their sum over the side, so that a side counts with its mean and not with its sum: what
    TRL does for ipo (the paper's equation is silent on length) and SimPO in its eq. 4 (arXiv 2405.14734)."""
    chosen, rejected = tokens.base_sides
    return _normal(chosen), _normal(rejected)


def length_desensitised(tokens: PairTokens) -> PairWeights:
    """LD-DPO (arXiv 2409.06411): tokens behind the length of the shorter side weigh `ld_alpha` times their base weight,
    lengths and places counted in tokens that the model wrote. The weights act on policy and reference alike, as in TRL;
    LLaMA-Factory's, under the same name, act on the policy alone."""
    written_sides = tokens.written_sides
    shared = min(written.sum() for written in written_sides)
    chosen, rejected = (
        base * np.where(written.cumsum() <= shared, 1.0, tokens.options.ld_alpha)
        for base, written in zip(tokens.base_sides, written_sides, strict=True)
    )
    return chosen.tolist(), rejected.tolist()


def temporal_decay(tokens: PairTokens) -> PairWeights:
    """D2PO (arXiv 2502.14340): the t-th token that the model wrote weighs `d2po_gamma^t` times its base weight, with t
    from 0 as in the paper. The published code counts from 1, which only multiplies beta by gamma."""
    chosen, rejected = (
        base * tokens.options.d2po_gamma ** (written.cumsum() - written)
        for base, written in zip(tokens.base_sides, tokens.written_sides, strict=True)
    )
    return chosen.tolist(), rejected.tolist()


def importance(tokens: PairTokens) -> PairWeights:
    """TIS-DPO (arXiv 2410.04350): base weight times `exp(mu clamp(s, tis_min, tis_max))` on the chosen side and
    `exp(-mu clamp(s, tis_min, tis_max))` on the rejected one, with the score `s = log p_plus - log p_minus` of two
    helper models. The paper's constant k scales beta and is left out, and so is its KL term, as in the published code's
    default; for the weights we follow the paper, the code ranks, clips or drops them."""
    low, high, mu = tokens.options.tis_min, tokens.options.tis_max, tokens.options.tis_mu
    chosen, rejected = (
        base * np.exp(sign * mu * score.clip(low, high))
        for sign, base, score in zip((1, -1), tokens.base_sides, tokens.score_sides, strict=True)
    )
    return chosen.tolist(), rejected.tolist()


def reward_guided(tokens: PairTokens) -> PairWeights:
    """TGDPO (arXiv 2506.14574, published code): base weight times `1 + tgdpo_alpha beta s` on the chosen side and
    `1 - tgdpo_alpha beta s` on the rejected one, with the score `s = log p_reward - log p_ref`. A weight may become
    negative, as it may there."""
    scale = tokens.options.tgdpo_alpha * tokens.options.beta
    chosen, rejected = (
        base * (1 + sign * scale * score)
        for sign, base, score in zip((1, -1), tokens.base_sides, tokens.score_sides, strict=True)
    )
    return chosen.tolist(), rejected.tolist()


def selected(tokens: PairTokens) -> PairWeights:
    """SePO (arXiv 2408.13518): on the chosen side the `sepo_ratio` of tokens with the highest score, on the rejected
    side those with the lowest, `s = log p_oracle - log p_ref`; of a side with n tokens of weight above 0
    `floor(sepo_ratio n)` are kept, and at least one, the earlier of equals first. A side counts with the mean over what
    is kept, there is no reference, and beta is the paper's gamma, which the published code leaves out (1)."""
    sides = []
    for sign, base, score in zip((-1, 1), tokens.base_sides, tokens.score_sides, strict=True):
        candidates = np.flatnonzero(base > 0)
        number = max(1, int(tokens.options.sepo_ratio * len(candidates)))
        kept = candidates[np.argsort(sign * score[candidates], kind="stable")[:number]]
        mask = np.zeros(len(base))
        mask[kept] = 1
        sides.append(_normal(mask * base))
    return sides[0], sides[1]


def once(tokens: PairTokens) -> PairWeights:
    """1 for each chosen token that the model wrote, in the first pair of the tree whose chosen side has it, and 0
    elsewhere: over the pairs of a tree every token counts once, however many pairs share it."""
    tree, pair = tokens.tree, tokens.pair
    before = {n for earlier in takewhile(lambda p: p is not pair, tree.pairs) for n in tree.path(earlier.chosen)}
    weights: list[float] = []
    for n in tree.path(pair.chosen):
        node = tree.nodes[n]
        weights += [0.0] * len(node.ids) if n in before else node.trained or [1.0] * len(node.ids)
    return weights, [0.0] * len(tokens.base[1])


def leaf_mean(tokens: PairTokens) -> PairWeights:
    """1 / n for each of the n tokens of the chosen leaf that the model wrote, so that their weighted sum is a mean."""
    return _normal(tokens.written_sides[0]), [0.0] * len(tokens.base[1])


def _normal(weights: np.ndarray) -> Sequence[float]:
    total = weights.sum()
    return (weights / total if total > 0 else weights).tolist()
