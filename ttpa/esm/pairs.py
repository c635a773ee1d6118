"""Which leaves of a tree make preference pairs."""

from __future__ import annotations

from typing import Any

from ttpa.tools.call import Call
from ttpa.trees.record import Leaf, Pair

RELEASE_THRESHOLD = 0.8


def strict_pairs(leaves: list[Leaf]) -> list[Pair]:
    """An exact leaf over every other one.

    Chosen is the first sample that scores 1.0, the model's own tokens being the better target, and else the leaf of
    kind gold. Rejected is every leaf that scores less; of leaves with the same calls and the same errors only the
    first. No pairs if there is neither an exact sample nor gold. Every leaf must have a score.
    """
    exact = [i for i, leaf in enumerate(leaves) if _score(leaf) == 1.0 and leaf.kind != "gold"]
    gold = [i for i, leaf in enumerate(leaves) if leaf.kind == "gold"]
    if not exact and not gold:
        return []
    chosen = (exact + gold)[0]
    rejected: dict[Any, int] = {}
    for i, leaf in enumerate(leaves):
        if leaf.kind != "gold" and _score(leaf) < 1.0:
            errors = [(error["code"], error["call"], error["pointer"]) for error in leaf.errors]
            rejected.setdefault((_normal(leaf), str(errors)) if leaf.calls else i, i)
    return [_pair(leaves, chosen, i) for i in rejected.values()]


def release_pairs(leaves: list[Leaf], *, gold_sampled: bool = False) -> list[Pair]:
    """The published rule: gold over all samples if the best one scores below 0.8, else the best one over worse ones.

    Samples are the leaves that are not of kind gold, and the gold leaf too if the model sampled just its tokens
    (`gold_sampled`). Samples with the same first call count once, the first of them. If the best score is at least
    0.8, chosen is the last sample that has it and rejected are all that score less, which includes those without a
    call. Every leaf must have a score. Source: TTPA (arXiv 2505.20016), published code.
    """
    samples: dict[Any, int] = {}
    for i, leaf in enumerate(leaves):
        if leaf.kind != "gold" or gold_sampled:
            samples.setdefault(_normal(leaf)[0] if leaf.calls else i, i)
    best = max((_score(leaves[i]) for i in samples.values()), default=0.0)
    if best < RELEASE_THRESHOLD:
        gold = [i for i, leaf in enumerate(leaves) if leaf.kind == "gold"]
        return [_pair(leaves, gold[0], i) for i in samples.values()] if gold else []
    chosen = [i for i in samples.values() if _score(leaves[i]) == best][-1]
    return [_pair(leaves, chosen, i) for i in samples.values() if _score(leaves[i]) < best]


def _score(leaf: Leaf) -> float:
    assert leaf.score is not None, "pairs are made of scored leaves"
    return leaf.score


def _normal(leaf: Leaf) -> tuple[str, ...]:
    return tuple(Call(call["name"], call["arguments"]).normal() for call in leaf.calls)


def _pair(leaves: list[Leaf], chosen: int, rejected: int) -> Pair:
    return Pair(chosen, rejected, _score(leaves[chosen]) - _score(leaves[rejected]))
