"""What each token of a trajectory is: a part of a call, a tool's result, the end of a turn, text."""

from __future__ import annotations

from typing import Any

import numpy as np

from ttpa.tools.dialects.detect import find_dialect
from ttpa.tools.fields import character_fields
from ttpa.tools.speakers import Speaker, read_stretches
from ttpa.trees.record import PreferenceTree

CLASSES = (
    *("tool_name", "argument_key", "argument_value", "tool_result", "end_of_turn", "scaffolding", "prompt", "text"),
)
"""A token that touches several classes has the first of them. `scaffolding` is what stands around the parts of a call
(tags, brackets, commas) and between two turns (headers), `prompt` what users and the system say; the `prompt_ids` of a
tree are all of that class. Whatever is not known to be something else is text."""

_NAME, _KEY, _VALUE, _RESULT, _END, _SCAFFOLDING, _PROMPT, _TEXT = range(len(CLASSES))
_OF_FIELD = {
    "name": _NAME,
    "key": _KEY,
    "value": _VALUE,
    "string": _VALUE,
    "bracket": _SCAFFOLDING,
    "tag": _SCAFFOLDING,
}
_OF_SPEAKER: dict[Speaker, int] = {
    "model": _TEXT,
    "tool": _RESULT,
    "prompt": _PROMPT,
    "end": _END,
    "template": _SCAFFOLDING,
}


def tree_classes(tree: PreferenceTree, tokenizer: Any) -> np.ndarray:
    """The class of every completion token of a tree, int8 indexes into CLASSES, over all nodes in their order.

    Calls are read in the dialect of the tokenizer (they are text if it has none), turns are told apart as
    `read_stretches` does; what the model did not write in the middle of its turn is a tool's result if a call stands
    before it, else prompt. A token that several completions share has the class that it has in the first of them, those
    preferred in a pair before the others; a node that is on the way to no leaf is text. Raises InputError for a
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


def _completion_classes(tree: PreferenceTree, leaf: int, tokenizer: Any) -> list[int]:
    """The class of each token of one completion."""
    ids, dialect = tree.completion_ids(leaf), find_dialect(tokenizer)
    marks = () if dialect is None else dialect.marks
    text, spans, stretches = read_stretches(tokenizer, ids, written=tree.trained(leaf), marks=marks)
    of_character: list[int] = []
    called = False
    for stretch in stretches:
        length = stretch.end - stretch.start
        if stretch.speaker == "model" and dialect is not None:
            turn = dialect.read(text[stretch.start : stretch.end], tree.tools)
            called = bool(turn.calls)
            of_character += [_OF_FIELD.get(field or "", _TEXT) for field in character_fields(turn, ())]
        elif stretch.speaker == "given":
            of_character += [_RESULT if called else _PROMPT] * length
        else:
            of_character += [_OF_SPEAKER[stretch.speaker]] * length
    classes = [min(of_character[start:end], default=_TEXT) for start, end in spans]
    return [_END if i == tokenizer.eos_token_id else c for i, c in zip(ids, classes, strict=True)]
