"""Preference trees on disk: JSON Lines, one tree a line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ttpa.errors import InputError, OnError
from ttpa.files import atomic_write
from ttpa.trees.record import Leaf, Node, Pair, PreferenceTree

KINDS = ("gold", "trunk", "branch", "given")
FINISHES = ("stop", "length")


def iterate_trees(path: Path | str, *, on_error: OnError | None = None) -> Iterator[PreferenceTree]:
    """Yield the trees of a JSON Lines file one by one; empty lines are skipped.

    Raises InputError with file and line for text that is not UTF-8, broken JSON, a missing or unknown field, a value
    of the wrong type, an index out of range, nodes that are not in depth-first order, a tree without leaves, and a pair
    whose two sides are the same. Where `on_error` is given, it is called instead, and the next line is read.
    """
    try:
        lines = open(path, "rb")  # noqa: SIM115 (closed by the with below)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path=path) from error
    with lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                # line by line, so that a broken character has its line; editors put a mark before the first one
                tree = _read_line(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 text ({error.reason}); convert the file to UTF-8"
            except _Fault as error:
                problem = str(error)
            else:
                yield tree
                continue
            located = InputError(problem, path=path, line=number)
            if on_error is None:
                raise located
            on_error(located)


def read_trees(path: Path | str) -> list[PreferenceTree]:
    """All trees of a JSON Lines file, as `iterate_trees` yields them; raises InputError where that does."""
    return list(iterate_trees(path))


def tree_line(tree: PreferenceTree) -> str:
    """One tree as its line of a JSON Lines file."""
    return json.dumps(tree.to_dict(), ensure_ascii=False, separators=(",", ":")) + "\n"


def write_trees(path: Path | str, trees: Iterable[PreferenceTree]) -> int:
    """Write trees as JSON Lines and return how many; `path` changes only once the last one is written."""
    count = 0
    with atomic_write(path) as file:
        for tree in trees:
            file.write(tree_line(tree))
            count += 1
    return count


class _Fault(Exception):
    """What is wrong with one record; the caller adds file and line."""


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise _Fault(problem)


def _read_line(line: str) -> PreferenceTree:
    try:
        return _tree(json.loads(line))
    except RecursionError:
        raise _Fault("not a tree: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _Fault(f"not JSON ({error}); write one tree a line") from None


def _tree(record: Any) -> PreferenceTree:
    _check_fields(PreferenceTree, record, "the tree")
    for name, part in (("nodes", Node), ("leaves", Leaf), ("pairs", Pair)):
        _expect(isinstance(record[name], list), f"{name} must be a list")
        for i, value in enumerate(record[name]):
            _check_fields(part, value, f"{name}[{i}]")
    tree = PreferenceTree.from_dict(record)
    for name in ("id", "dialogue"):
        _expect(isinstance(getattr(tree, name), str), f"{name} must be text")
    _expect(_is_index(tree.turn), "turn must be an integer from 0")
    for name in ("tools", "messages"):
        _expect(_is_list(getattr(tree, name), lambda x: isinstance(x, dict)), f"{name} must be a list of objects")
    _expect(isinstance(tree.origin, dict), "origin must be an object")
    _expect(_is_list(tree.prompt_ids, _is_index) and len(tree.prompt_ids) > 0, "prompt_ids must be a list of token ids")
    _check_nodes(tree.nodes)
    _expect(len(tree.leaves) > 0, "leaves must not be empty")
    for i, leaf in enumerate(tree.leaves):
        _check_leaf(leaf, tree, i)
    for i, pair in enumerate(tree.pairs):
        for side in ("chosen", "rejected"):
            _expect(
                _is_index(getattr(pair, side), len(tree.leaves)),
                f"pairs[{i}].{side} must be an index into the {len(tree.leaves)} leaves",
            )
        _expect(
            tree.leaves[pair.chosen].node != tree.leaves[pair.rejected].node,
            f"pairs[{i}] has equal sides: chosen and rejected are the same completion; drop the pair",
        )
        _expect(_is_number(pair.margin), f"pairs[{i}].margin must be a finite number")
    return tree


def _check_fields(part: type, value: Any, where: str) -> None:
    _expect(isinstance(value, dict), f"{where} must be a JSON object")
    known = fields(part)  # type: ignore[arg-type]
    for field in known:
        required = field.default is MISSING and field.default_factory is MISSING
        _expect(field.name in value or not required, f"{where} has no field {field.name!r}")
    names = [field.name for field in known]
    for name in value:
        _expect(name in names, f"{where} has an unknown field {name!r}; known are {', '.join(names)}")


def _check_nodes(nodes: list[Node]) -> None:
    path = [-1]  # what a node may continue: the one before it, or one of that one's ancestors
    for i, node in enumerate(nodes):
        _expect(_is_list(node.ids, _is_index) and len(node.ids) > 0, f"nodes[{i}].ids must be a list of token ids")
        for name, valid in (("logps", _is_number), ("entropy", _is_number), ("trained", lambda x: x in (0, 1))):
            values = getattr(node, name)
            _expect(
                values is None or (_is_list(values, valid) and len(values) == len(node.ids)),
                f"nodes[{i}].{name} must be null or a list as long as ids"
                + (" of 0 and 1" if name == "trained" else " of finite numbers"),
            )
        _expect(
            node.parent in path,
            f"nodes[{i}].parent is {node.parent!r}, but nodes stand in depth-first order: "
            f"here it can be one of {', '.join(map(str, path))}",
        )
        path = [*path[: path.index(node.parent) + 1], i]


def _check_leaf(leaf: Leaf, tree: PreferenceTree, i: int) -> None:
    where = f"leaves[{i}]"
    _expect(_is_index(leaf.node, len(tree.nodes)), f"{where}.node must be an index into the {len(tree.nodes)} nodes")
    _expect(leaf.kind in KINDS, f"{where}.kind is {leaf.kind!r}, not one of {', '.join(KINDS)}")
    _expect(leaf.finish in FINISHES, f"{where}.finish is {leaf.finish!r}, not one of {', '.join(FINISHES)}")
    _expect(leaf.score is None or _is_number(leaf.score), f"{where}.score must be null or a finite number")
    for name in ("calls", "errors"):
        _expect(
            _is_list(getattr(leaf, name), lambda x: isinstance(x, dict)), f"{where}.{name} must be a list of objects"
        )
    length = sum(len(tree.nodes[node].ids) for node in tree.path(i))
    for e, error in enumerate(leaf.errors):
        tokens = error.get("tokens")
        _expect(
            [type(error.get(key)) for key in ("code", "call", "pointer")] == [str, int, str],
            f"{where}.errors[{e}] must have code and pointer, both text, and call, an integer",
        )
        _expect(
            tokens is None
            or (_is_list(tokens, _is_index) and len(tokens) == 2 and tokens[0] <= tokens[1] and tokens[1] <= length),
            f"{where}.errors[{e}].tokens must be a half-open range within the {length} completion tokens",
        )


def _is_index(value: Any, bound: float = math.inf) -> bool:
    return type(value) is int and 0 <= value < bound


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_list(value: Any, valid: Any) -> bool:
    return isinstance(value, list) and all(map(valid, value))
