"""What kind of token each completion token is, and margins, accuracies and forks by kind."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ttpa.tools.dialects.hermes import HERMES
from ttpa.tools.fields import character_fields
from ttpa.tools.tokens import token_spans
from ttpa.trees.pack import TreeBatch
from ttpa.trees.record import PreferenceTree

CLASSES = ("tool_name", "argument_key", "argument_value", "tool_result", "end_of_turn", "scaffolding", "text")
"""A token that touches several classes has the first of them. `scaffolding` is what stands around the parts of a call
(tags, brackets, commas) and between two turns (headers); whatever is not known to be something else is text."""

SUMS = (
    *("pairs", "fork/pairs", "fork/margins", "fork/right"),
    *(f"{part}/{name}" for part in ("margins", "right", "pairs", "fork") for name in CLASSES),
)
"""The names of `class_sums`."""

_OF_FIELD = {
    "name": CLASSES.index("tool_name"),
    "key": CLASSES.index("argument_key"),
    "value": CLASSES.index("argument_value"),
    "string": CLASSES.index("argument_value"),
    "bracket": CLASSES.index("scaffolding"),
    "tag": CLASSES.index("scaffolding"),
}
_RESULT, _END, _SCAFFOLDING, _TEXT = map(CLASSES.index, ("tool_result", "end_of_turn", "scaffolding", "text"))
_BETWEEN_TURNS = re.compile(r"<\|im_end\|>(\s*(?:<\|im_start\|>(\w+)\n)?)")
_TOOL_RESPONSE = re.compile(r"<tool_response>.*?(?:</tool_response>|\Z)", re.DOTALL)


def tree_classes(tree: PreferenceTree, tokenizer: Any) -> np.ndarray:
    """The class of every completion token of a tree, int8 indexes into CLASSES, over all nodes in their order.

    Calls are read as Hermes and Qwen models write them, turns as ChatML. A token that several completions share has
    the class that it has in the first of them, those preferred in a pair before the others; a node that is on the way
    to no leaf is text. Raises InputError for a
    tokenizer that `token_spans` cannot read.
    """
    of_node: dict[int, list[int]] = {}
    preferred = [pair.chosen for pair in tree.pairs]
    for leaf in dict.fromkeys([*preferred, *range(len(tree.leaves))]):
        path = tree.path(leaf)
        if path[-1] in of_node:  # then so are the nodes before it
            continue
        classes = _completion_classes(tree, leaf, tokenizer)
        for n in path:
            length = len(tree.nodes[n].ids)
            of_node.setdefault(n, classes[:length])
            classes = classes[length:]
    on_no_path = ([_TEXT] * len(node.ids) for node in tree.nodes)
    return np.array([c for n, text in enumerate(on_no_path) for c in of_node.get(n, text)], dtype=np.int8)


def class_counts(class_N: np.ndarray) -> dict[str, int]:
    """The number of tokens of each class, 0 included, in the order of CLASSES."""
    return dict(zip(CLASSES, np.bincount(class_N, minlength=len(CLASSES)).tolist(), strict=True))


def class_sums(
    pack: TreeBatch, class_N: np.ndarray, *, logp_R: torch.Tensor, ref_logp_R: torch.Tensor, beta: float
) -> dict[str, float]:
    """Sums over the pairs of a pack, named as in SUMS, that become metrics once packs and processes are added up.

    `class_N` are the `tree_classes` of the pack's trees one after the other; `logp_R` and `ref_logp_R` are
    log-probabilities in nats of all rows, trained and reported, and `beta * (logp - ref_logp)` their rewards.
    `margins/CLASS` is the reward of the chosen side's tokens of the class minus that of the rejected side's,
    `right/CLASS` the number of pairs in which it is above 0, `pairs/CLASS` the number of pairs whose sides differ in a
    token of the class. The fork of a pair is the first token in which its sides differ, where the model wrote it on
    both: `fork/margins` is the reward of the chosen token minus that of the rejected one, `fork/right` counts those
    above 0, `fork/CLASS` the pairs whose chosen token there has the class.
    """
    num_pairs, width = len(pack.pairs), len(CLASSES)
    difference = (pack.chosen_PR - pack.rejected_PR).cpu().coalesce()
    differs = difference.values() != 0
    pair_N, row_N = difference.indices()[:, differs].numpy()
    sign_N = difference.values()[differs].numpy()
    reward_R = beta * (logp_R.detach().double() - ref_logp_R.detach().double()).cpu().numpy()
    place_R = pack.place_R.cpu().numpy()
    class_R = class_N[place_R]

    cell_N = pair_N * width + class_R[row_N]
    size = num_pairs * width
    margin_PC = np.bincount(cell_N, sign_N * reward_R[row_N], minlength=size).reshape(num_pairs, width)
    present_PC = np.bincount(cell_N, minlength=size).reshape(num_pairs, width) > 0

    fork_P = np.full((2, num_pairs), -1)
    for side, taken_N in enumerate((sign_N > 0, sign_N < 0)):
        pairs, rows = pair_N[taken_N], row_N[taken_N]
        order = np.lexsort((place_R[rows], pairs))  # along a path places rise
        pairs, first = np.unique(pairs[order], return_index=True)
        fork_P[side, pairs] = rows[order][first]
    before_R = pack.row_R.cpu().numpy()
    chosen, rejected = fork_P[:, (fork_P >= 0).all(axis=0) & (before_R[fork_P[0]] == before_R[fork_P[1]])]
    fork_margin = reward_R[chosen] - reward_R[rejected]

    by_class = (
        margin_PC.sum(axis=0),
        (margin_PC > 0).sum(axis=0),
        present_PC.sum(axis=0),
        np.bincount(class_R[chosen], minlength=width),
    )
    totals = [num_pairs, len(chosen), fork_margin.sum(), (fork_margin > 0).sum()]
    return dict(zip(SUMS, np.concatenate([totals, *by_class]).tolist(), strict=True))


def add_sums(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The `class_sums` of several packs in one; zeros for none."""
    parts = list(parts)
    return {name: math.fsum(part[name] for part in parts) for name in SUMS}


def class_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """What the log says of `class_sums`: `rewards/margins/CLASS`, means over all pairs, which add up to
    `rewards/margins`; `rewards/accuracies/CLASS`, the share of right ones among the pairs whose sides differ in the
    class; `fork/margins` and `fork/accuracies`, means over the pairs that have a fork, and `fork/shares/CLASS`, shares
    of all pairs. Classes in which no pair differs are left out."""
    metrics: dict[str, float] = {}
    for name in CLASSES:
        if sums[f"pairs/{name}"]:
            metrics[f"rewards/margins/{name}"] = sums[f"margins/{name}"] / sums["pairs"]
            metrics[f"rewards/accuracies/{name}"] = sums[f"right/{name}"] / sums[f"pairs/{name}"]
    if sums["fork/pairs"]:
        metrics["fork/margins"] = sums["fork/margins"] / sums["fork/pairs"]
        metrics["fork/accuracies"] = sums["fork/right"] / sums["fork/pairs"]
    for name in CLASSES:
        if sums[f"fork/{name}"]:
            metrics[f"fork/shares/{name}"] = sums[f"fork/{name}"] / sums["pairs"]
    return metrics


def _completion_classes(tree: PreferenceTree, leaf: int, tokenizer: Any) -> list[int]:
    """The class of each token of one completion."""
    ids = tree.completion_ids(leaf)
    text, spans = token_spans(tokenizer, ids)
    of_character = _character_classes(text)
    classes = [min(of_character[start:end], default=_TEXT) for start, end in spans]
    added, eos, last = tokenizer.added_tokens_decoder, tokenizer.eos_token_id, len(ids)
    while last and ids[last - 1] in added and added[ids[last - 1]].special:
        last -= 1
    return [_END if i >= last or ids[i] == eos else c for i, c in enumerate(classes)]


def _character_classes(text: str) -> list[int]:
    classes = [_TEXT] * len(text)
    start, role = 0, "assistant"
    for mark in [*_BETWEEN_TURNS.finditer(text), None]:
        end = len(text) if mark is None else mark.start()
        if role == "assistant":
            fields = character_fields(HERMES.parse(text[start:end], ()), ())
            classes[start:end] = [_TEXT if field is None else _OF_FIELD.get(field, _TEXT) for field in fields]
        elif role == "tool":
            classes[start:end] = [_RESULT] * (end - start)
        else:
            for result in _TOOL_RESPONSE.finditer(text, start, end):
                classes[result.start() : result.end()] = [_RESULT] * len(result[0])
        if mark is not None:
            first, start = mark.span(1)
            classes[first:start] = [_SCAFFOLDING] * (start - first)
            role = mark[2] or role
    return classes
