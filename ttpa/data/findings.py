"""What is odd about trees and gold calls: nothing that stops a run, but whoever trains on them should know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ttpa.data.messages import calls_of, checked_messages, tool_names
from ttpa.errors import InputError
from ttpa.esm.differences import schema_differences
from ttpa.esm.score import score_call
from ttpa.tools.completion import read_completion
from ttpa.tools.json_scan import pointer
from ttpa.tools.prefix import shared_length
from ttpa.tools.schema import functions
from ttpa.trees.classes import CLASSES
from ttpa.trees.record import Pair, PreferenceTree

Finding = tuple[str, str]
"""What was found, one of a small set of phrases, and what is particular to this one."""

TOOL_RESULT = CLASSES.index("tool_result")


@dataclass(frozen=True)
class Calls:
    """The calls of an answer as `{"name", "arguments"}`, and what of it is no valid JSON."""

    records: list[dict[str, Any]]
    unreadable: list[str]

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]]) -> Calls:
        """Calls out of records, in which readers keep arguments that are no JSON object as the text that they are."""
        calls = cls([], [])
        for record in records:
            if isinstance(record.get("name"), str) and isinstance(record.get("arguments"), dict):
                calls.records.append(record)
            else:
                calls.unreadable.append(f"{record.get('name')}: {record.get('arguments')!r:.60}")
        return calls


def usable_tools(tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The tools and "" if calls can be checked against them, else none and why not: data made for other trainers holds
    types that are no JSON Schema, and the same tool twice."""
    try:
        functions(tools)
    except InputError as error:
        return [], str(error)
    return tools, ""


def call_findings(side: str, calls: Calls, tools: list[dict[str, Any]]) -> Iterator[Finding]:
    """What is wrong with the calls of the side named: no valid JSON, a tool that is not in the list (where there is
    one) and, but for rejected calls, arguments that break their tool's JSON Schema. Raises InputError for a tool
    without a name and for a schema that refers to something outside of it."""
    yield from ((f"{side} call is not valid JSON", detail) for detail in calls.unreadable)
    offered, schemas = tool_names(tools), {} if side == "rejected" else functions(usable_tools(tools)[0])
    for call in calls.records:
        if offered and call["name"] not in offered:
            yield f"{side} call names no tool of the list", call["name"]
        elif call["name"] in schemas:
            for difference in schema_differences(call["arguments"], schemas[call["name"]]["parameters"]):
                yield f"{side} call breaks its schema", f"{call['name']} {pointer(difference.path)}: {difference.code}"


def tree_findings(tree: PreferenceTree, tokenizer: Any, *, read_text: bool) -> Iterator[Finding]:
    """What is odd about the calls of a tree, in its prompt and on the sides of its pairs. `read_text` says whether the
    calls of an answer without records are read from its text. Raises InputError as `call_findings`, and for malformed
    messages."""
    usable, problem = usable_tools(tree.tools)
    if problem:
        yield "calls cannot be checked against the tools", problem
    history = checked_messages(tree.messages, "messages") if tree.messages else []
    yield from call_findings("prompt", Calls.of(calls_of(history)), tree.tools)
    chosen, rejected = {pair.chosen for pair in tree.pairs}, {pair.rejected for pair in tree.pairs}
    calls = {leaf: _leaf_calls(tree, leaf, tokenizer, read_text) for leaf in sorted(chosen | rejected)}
    for leaf, found in calls.items():
        yield from call_findings("chosen" if leaf in chosen else "rejected", found, tree.tools)
    for pair in tree.pairs:
        yield from _same_calls(calls[pair.chosen], calls[pair.rejected], usable)
        if tokenizer.decode(tree.completion_ids(pair.chosen)) == tokenizer.decode(tree.completion_ids(pair.rejected)):
            yield "both sides read the same, in other tokens", _leaves(pair)


def repeated_pairs(tree: PreferenceTree, seen: dict[Any, str]) -> Iterator[Finding]:
    """Pairs that an earlier tree has as well, the same way round or the other; `seen` holds the pairs so far with the
    id of their tree, and gets these."""
    prompt = tuple(tree.prompt_ids)
    for pair in tree.pairs:
        sides = tuple(tree.completion_ids(pair.chosen)), tuple(tree.completion_ids(pair.rejected))
        as_it_is, turned = (prompt, *sides), (prompt, *sides[::-1])
        if turned in seen:
            yield "pair comes the other way round as well", seen[turned]
        elif as_it_is in seen:
            yield "pair comes twice", seen[as_it_is]
        seen.setdefault(as_it_is, tree.id)


def fork_findings(tree: PreferenceTree, class_N: np.ndarray) -> Iterator[Finding]:
    """Pairs whose sides part where no decision of the model is: in a tool's result, or else in tokens that it did not
    write; `class_N` are the `tree_classes`. Raises InputError, as training does before its first step, where a tool's
    result is in the difference as if the model had written it."""
    ends = np.cumsum([0, *(len(node.ids) for node in tree.nodes)])
    trained_result = False
    for pair in tree.pairs:
        leaves = (pair.chosen, pair.rejected)
        ids = [tree.completion_ids(leaf) for leaf in leaves]
        fork = shared_length(*ids)
        after = []  # the class of every token from the fork on, and whether the model wrote it
        for leaf in leaves:
            classes = [c for n in tree.path(leaf) for c in class_N[ends[n] : ends[n + 1]].tolist()]
            after.append(list(zip(classes, tree.trained(leaf), strict=True))[fork:])
        first = [side[0] for side in after if side]
        if any(c == TOOL_RESULT for c, _ in first):
            yield "fork inside a tool result", _leaves(pair)
        elif not any(trained for _, trained in first):
            yield "fork where the model does not write", _leaves(pair)
        if not any(trained for side in after for _, trained in side):
            yield "nothing that the model wrote differs", _leaves(pair)
        trained_result |= any(c == TOOL_RESULT and trained for side in after for c, trained in side)
    if trained_result:
        raise InputError("tokens of a tool's result would be trained; set `trained` to 0 for them")


def _leaves(pair: Pair) -> str:
    return f"leaves {pair.chosen} and {pair.rejected}"


def _same_calls(chosen: Calls, rejected: Calls, tools: list[dict[str, Any]]) -> Iterator[Finding]:
    """The rejected calls as the strict preset sees them, the chosen ones being gold: it takes parallel calls in any
    order, 1.0 for 1 and a default for a parameter left out, and calls a string near that differs in case, punctuation
    and white space only."""
    if not chosen.records or chosen.unreadable or rejected.unreadable:
        return
    score = score_call(rejected.records, chosen.records, tools)
    names = ", ".join(call["name"] for call in chosen.records)
    if score.valid:
        yield "rejected side makes the chosen calls", names
    elif all(error.code == "value.near" for error in score.errors):
        yield "rejected side makes the chosen calls but for case and punctuation", names


def _leaf_calls(tree: PreferenceTree, leaf: int, tokenizer: Any, read_text: bool) -> Calls:
    calls = Calls.of(tree.leaves[leaf].calls)
    codes = [str(error["code"]) for error in tree.leaves[leaf].errors if error["code"] == "format.unparseable"]
    codes = [] if calls.unreadable else codes  # the error is then that of the record
    if calls.records or calls.unreadable or codes or not read_text or not all(tree.trained(leaf)):
        return Calls(calls.records, calls.unreadable + codes)
    turn, _ = read_completion(tokenizer, tree.completion_ids(leaf), tree.tools)
    broken = [error.message for error in turn.errors if error.code == "format.unparseable"]
    read = [call for call in turn.calls if call.name is not None and call.arguments is not None]
    return Calls([{"name": call.name, "arguments": call.arguments} for call in read], broken)
