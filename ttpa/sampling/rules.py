"""The fork rules: what is known of a token, turned into a score; and the floors that hold under all of them."""

from __future__ import annotations

from collections.abc import Callable

from ttpa.sampling.decoded import Decoded
from ttpa.sampling.options import RuleName, SamplingOptions

FORCED = 0.995
"""A token of this probability or more is no choice."""

GAP_LEAST, GAP_MOST = 0.25, 0.15
FIRST = 20


def entropy(decoded: Decoded, at: int) -> float:
    """`H = -sum_v p_v log p_v` in nats, of the whole vocabulary. Ranking the tokens of a tree by it is the rule that
    TreeRL describes (arXiv 2506.11902); published code takes surrogates of H (see `surprise` and `change`)."""
    return decoded.entropy[at]


def gap(decoded: Decoded, at: int) -> float:
    """`1 - (p1 - p2)` of the two likeliest tokens: 1 for a tie. LATR (arXiv 2510.24302) forks where `p > 0.25` and
    `p1 - p < 0.15`; `alternatives` holds each token to these thresholds. The score is ours, LATR has none; its looking
    ahead and its pruning of like branches are left out."""
    p1, p2 = decoded.top_probabilities[at, :2].tolist()
    return 1.0 - (p1 - p2)


def surprise(decoded: Decoded, at: int) -> float:
    """`-log p` in nats of the token that was taken: by which the code of TreeRL ranks where its paper says entropy; SPO
    (arXiv 2505.23564) cuts where that p is below 0.9, a threshold that a rank among tokens does not need. Both draw
    their tokens; for the likeliest token of a greedy path it grows as p1 falls and says nothing of the others."""
    return -decoded.logps[at]


def change(decoded: Decoded, at: int) -> float:
    """`H - mean(H of the first 20 tokens before this one)`: how much less sure the model is than it was at first. After
    ARPO (arXiv 2507.19849), which compares the beginnings of turns, not tokens, sums p log p over the 10 likeliest
    tokens, divides by log V (which changes no order), and draws whether to fork. A fall is negative and no candidate;
    at the first token the change is H."""
    before = decoded.entropy[: min(at, FIRST)]
    return decoded.entropy[at] - sum(before) / max(len(before), 1)


def varentropy(decoded: Decoded, at: int) -> float:
    """`sum_v p_v (log p_v + H)^2` in nats squared: high where a likely token stands beside many unlikely ones, 0 for a
    tie. Entropy-gated branching (arXiv 2503.21961) and Entropix ask that it exceeds a threshold besides H; ranking by
    it is ours, and `min_entropy` is the threshold of H."""
    return decoded.varentropy[at]


RULES: dict[RuleName, Callable[[Decoded, int], float]] = {
    "entropy": entropy,
    "gap": gap,
    "surprise": surprise,
    "change": change,
    "varentropy": varentropy,
}


def alternatives(decoded: Decoded, at: int, *, options: SamplingOptions) -> list[tuple[int, float]]:
    """The other tokens to try at one position with their probabilities, at most `options.alternatives`, the likeliest
    first; empty where a floor is not met. With p1 the probability of the path's own token and p2 that of the likeliest
    other one the floors are p1 < FORCED, H >= min_entropy, p2 >= min_ratio x p1, and p >= min_probability for each
    token; rule gap adds LATR's thresholds for each token. The floors are our own."""
    if decoded.entropy[at] < options.min_entropy:
        return []
    likely = list(zip(decoded.top_ids[at].tolist(), decoded.top_probabilities[at].tolist(), strict=True))
    own = next((p for token, p in likely if token == decoded.ids[at]), 0.0)
    others = [(token, p) for token, p in likely if token != decoded.ids[at] and p >= options.min_probability and p > 0]
    if options.rule == "gap":
        others = [(token, p) for token, p in others if p > GAP_LEAST and likely[0][1] - p < GAP_MOST]
    if own >= FORCED or not others or others[0][1] < options.min_ratio * own:
        return []
    return others[: options.alternatives]
