"""Preference trees as the page reads them: texts of tokens, what is known of each, errors with what was expected."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ttpa.errors import InputError
from ttpa.esm.score import score_tokens
from ttpa.tools.tokens import token_spans
from ttpa.trees.classes import CLASSES, tree_classes
from ttpa.trees.pack import PairWeights
from ttpa.trees.record import PreferenceTree

SUMMARY_CHARACTERS = 160


class Recorder:
    """Collects the records of a page. `lines` holds one JSON object a tree, `rows` what the list and the filters need
    of each; tokens are indexes into `pieces`, whose entries are `[id, text]`. `weights` gives the token weights of a
    pair. Raises InputError for a tokenizer that `token_spans` cannot read."""

    def __init__(self, tokenizer: Any, *, weights: Callable[[Any, Any], PairWeights]) -> None:
        self.tokenizer, self.weights = tokenizer, weights
        self.lines: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self._pieces: dict[tuple[int, str], int] = {}
        self._entropy: list[float] = []
        self._ratios: list[float] = []

    def add(self, tree: PreferenceTree, *, ratios: np.ndarray | None = None) -> None:
        """Add a tree; `ratios` are log-ratios in nats of its completion tokens, all nodes in order, NaN if unknown."""
        prompt, _ = token_spans(self.tokenizer, tree.prompt_ids)
        classes = tree_classes(tree, self.tokenizer)
        nodes, first = [], 0
        for node in tree.nodes:
            last = first + len(node.ids)
            record: dict[str, Any] = {
                "parent": node.parent,
                "tokens": self._tokens(node.ids),
                "classes": classes[first:last].tolist(),
            }
            if node.logps is not None:
                record["logps"] = _rounded(node.logps)
            if node.entropy is not None:
                record["entropy"] = _rounded(node.entropy)
                self._entropy += node.entropy
            if node.trained is not None:
                record["trained"] = node.trained
            if ratios is not None:
                record["ratios"] = _rounded(ratios[first:last])
                self._ratios += np.abs(ratios[first:last][~np.isnan(ratios[first:last])]).tolist()
            nodes.append(record)
            first = last
        leaves = [
            {
                "node": leaf.node,
                "kind": leaf.kind,
                "finish": leaf.finish,
                "score": leaf.score,
                "errors": self._errors(tree, i),
            }
            for i, leaf in enumerate(tree.leaves)
        ]
        pairs = []
        for pair in tree.pairs:
            chosen, rejected = self.weights(tree, pair)
            weights = [_rounded(chosen), _rounded(rejected)]
            pairs.append({"chosen": pair.chosen, "rejected": pair.rejected, "margin": pair.margin, "weights": weights})
        about = _about(tree, prompt)
        record = {
            "id": tree.id,
            "dialogue": tree.dialogue,
            "turn": tree.turn,
            "about": about,
            "prompt": prompt,
            "prompt_tokens": len(tree.prompt_ids),
            "tools": _names(tool.get("function") for tool in tree.tools),
            "nodes": nodes,
            "leaves": leaves,
            "pairs": pairs,
        }
        self.lines.append(json.dumps(record, separators=(",", ":")))
        self.rows.append(
            {
                "id": tree.id,
                "about": about[:SUMMARY_CHARACTERS],
                "calls": _names(call for leaf in tree.leaves for call in leaf.calls),
                "leaves": [
                    [leaf.kind, leaf.score, _names({"name": error.get("code")} for error in leaf.errors)]
                    for leaf in tree.leaves
                ],
                "pairs": len(tree.pairs),
            }
        )

    def header(self, facts: dict[str, Any]) -> str:
        """What the page reads before any tree, as one line of JSON: `facts`, the rows, the tokens, and the scales of
        its colours in nats, which all but one token of a hundred keep within."""
        header = {
            **facts,
            "classes": list(CLASSES),
            "pieces": [list(piece) for piece in self._pieces],
            "scales": {"entropy": _scale(self._entropy), "ratios": _scale(self._ratios)},
            "codes": dict(Counter(code for row in self.rows for _, _, codes in row["leaves"] for code in codes)),
            "kinds": dict(Counter(kind for row in self.rows for kind, _, _ in row["leaves"])),
            "rows": self.rows,
        }
        return json.dumps(header, separators=(",", ":"))

    def _tokens(self, ids: Sequence[int]) -> list[int]:
        """The tokens of a node; of a character that several tokens write a part of, the first one has the text."""
        text, spans = token_spans(self.tokenizer, ids)
        indexes, shown = [], 0
        for token, (start, end) in zip(ids, spans, strict=True):
            piece = (token, text[max(start, shown) : end])
            shown = max(shown, end)
            indexes.append(self._pieces.setdefault(piece, len(self._pieces)))
        return indexes

    def _errors(self, tree: PreferenceTree, leaf: int) -> list[dict[str, Any]]:
        """The errors of a leaf as they were recorded, with `expected` and `got` where scoring it once more, against the
        calls of a leaf without errors, finds the same error."""
        errors = [dict(error) for error in tree.leaves[leaf].errors]
        gold = next((other for other in tree.leaves if other.kind == "gold" or other.score == 1.0), None)
        if not errors or gold is None:
            return errors
        with contextlib.suppress(InputError):  # the record of a call or a tool is none: nothing is known then
            score = score_tokens(self.tokenizer, tree.completion_ids(leaf), gold.calls, tree.tools)
            found = {(error.code, error.call, error.pointer): error for error in score.errors}
            for error in errors:
                same = found.get((error.get("code", ""), error.get("call", -1), error.get("pointer", "")))
                if same is not None:
                    error["expected"], error["got"] = same.expected, same.got
        return errors


def highest_id(tree: PreferenceTree) -> int:
    """The highest token id of a tree."""
    return max(token for ids in (tree.prompt_ids, *(node.ids for node in tree.nodes)) for token in ids)


def _rounded(values: Sequence[float] | np.ndarray) -> list[float | None]:
    return [None if value != value else round(float(value), 4) for value in values]


def _scale(values: Sequence[float]) -> float:
    """The 99th percentile, rounded up to one digit; 1 where there is nothing to show."""
    high = float(np.percentile(values, 99)) if len(values) else 0.0
    if high <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(high))
    return float(f"{math.ceil(high / power) * power:.1g}")


def _names(records: Any) -> list[str]:
    """The different names among records, in their order; records without one are left out."""
    names = (record.get("name") for record in records if isinstance(record, dict))
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def _about(tree: PreferenceTree, prompt: str) -> str:
    """What the user asked last, else the end of the prompt."""
    asked = [message.get("content") for message in tree.messages if message.get("role") == "user"]
    text = next((content for content in reversed(asked) if isinstance(content, str)), prompt[-SUMMARY_CHARACTERS:])
    return " ".join(text.split())
