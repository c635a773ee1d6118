"""Trees of one prompt as one tree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ttpa.trees.record import Completion, PreferenceTree, merge_completions

MOST_PAIRS = 16
"""A step takes whole trees, so one prompt does not fill it."""


def merge_trees(trees: Iterable[PreferenceTree]) -> list[PreferenceTree]:
    """Trees with the same prompt ids, tools and messages as one tree, where the first of them stood, so that a prompt
    and what its answers share is computed once. A completion that several of them have is one leaf; pairs stay as many
    as they were. The id and the origin are those of the first tree, `origin["merged"]` has the ids of the others. Of
    more than MOST_PAIRS pairs there are several trees, and trees that know different things of the same completion
    (its errors, which of its tokens the model wrote) stay apart."""
    merged: list[PreferenceTree] = []
    last: dict[Any, int] = {}
    for tree in trees:
        key = (tuple(tree.prompt_ids), repr(tree.tools), repr(tree.messages))
        into = last.get(key)
        both = None if into is None else _merged(merged[into], tree)
        if into is None or both is None:
            last[key] = len(merged)
            merged.append(tree)
        else:
            merged[into] = both
    return merged


def _merged(one: PreferenceTree, other: PreferenceTree) -> PreferenceTree | None:
    """Both trees in one, None where they do not fit together."""
    if len(one.pairs) + len(other.pairs) > MOST_PAIRS:
        return None
    completions = [_completion(one, leaf) for leaf in range(len(one.leaves))]
    index = {tuple(completion.ids): i for i, completion in enumerate(completions)}
    of_leaf = []
    for leaf in range(len(other.leaves)):
        completion = _completion(other, leaf)
        i = index.setdefault(tuple(completion.ids), len(completions))
        if i == len(completions):
            completions.append(completion)
        elif completions[i].leaf != completion.leaf:
            return None
        of_leaf.append(i)
    nodes, leaves = merge_completions(completions)
    pairs = [replace(pair, chosen=of_leaf[pair.chosen], rejected=of_leaf[pair.rejected]) for pair in other.pairs]
    origin = {**one.origin, "merged": [*one.origin.get("merged", []), other.id]}
    both = replace(one, nodes=nodes, leaves=leaves, pairs=[*one.pairs, *pairs], origin=origin)
    written = [completion.trained for completion in completions]
    return both if [both.trained(leaf) for leaf in range(len(leaves))] == written else None


def _completion(tree: PreferenceTree, leaf: int) -> Completion:
    nodes = [tree.nodes[n] for n in tree.path(leaf)]
    return Completion(
        tree.completion_ids(leaf),
        replace(tree.leaves[leaf], node=-1),
        _joined([node.logps for node in nodes]),
        _joined([node.entropy for node in nodes]),
        tree.trained(leaf),
    )


def _joined(parts: Sequence[list[float] | None]) -> list[float] | None:
    known = [part for part in parts if part is not None]
    return [value for part in known for value in part] if len(known) == len(parts) else None
