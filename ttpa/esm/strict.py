"""The preset `strict`: all errors of a turn, each with its place, and a score that only an exact turn has in full."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ttpa.esm.differences import Difference, all_differences, schema_differences
from ttpa.esm.errors import PENALTY, Error, Score
from ttpa.esm.matching import best_assignment
from ttpa.tools.call import Call, normal_json
from ttpa.tools.hermes import ParsedCall, ParsedTurn
from ttpa.tools.json_scan import Span, pointer


def strict(turn: ParsedTurn, gold: list[Call], functions: dict[str, dict[str, Any]]) -> Score:
    """Find every error of a turn and score it.

    A call that is matched to a gold call scores prod_e (1 - penalty(e)) over its errors e, with `errors.PENALTY`: 0 for
    a fatal error, half for a major one, nine tenths for a minor one. The turn scores sum_calls / max(#calls, #gold)
    under the matching with the greatest sum, so a missing or an extra call takes an equal share; errors that belong to
    no call multiply the whole. Without gold calls the score is 1 if there is no call and 0 if there is one; no call
    where gold has one scores 0. The score is 1.0 exactly if there is no error (our own design; the released formula is
    in `release`).
    """
    errors = [_format_error(e.code, e.call, e.span, e.message) for e in turn.errors if e.call < 0]
    whole = _share(error.code for error in errors)
    end = (len(turn.text), len(turn.text))
    if not gold or not turn.calls:
        for call in turn.calls:
            errors += _format_errors(turn, call)
            errors.append(Error("unwanted_call", call.index, got=_record(call), span=call.span))
        if gold:
            errors.append(Error("no_call", 0, expected=gold[0].to_dict(), span=end))
        return Score(0.0 if turn.calls or gold else whole, not errors, errors)

    table = _Table(turn, gold, functions)
    pairs = table.match()
    gold_of = dict(pairs)
    seen = {normal_json(_record(turn.calls[i])) for i in gold_of}
    for call in turn.calls:
        if call.index in gold_of:
            errors += table.errors(call.index, gold_of[call.index])
        else:
            normal = normal_json(_record(call))
            code = "call.repeated" if normal in seen else "call.extra"
            seen.add(normal)
            errors += _format_errors(turn, call)
            errors.append(Error(code, call.index, got=_record(call), span=call.span))
    for index in sorted(set(range(len(gold))) - set(gold_of.values())):
        errors.append(Error("call.missing", index, expected=gold[index].to_dict(), span=end))
    total = sum(table.score(i, j) for i, j in pairs)
    return Score(whole * total / max(len(turn.calls), len(gold)), not errors, errors)


def match(turn: ParsedTurn, gold: list[Call], functions: dict[str, dict[str, Any]]) -> list[tuple[int, int]]:
    """Pairs (call, gold call) of the matching with the greatest sum of strict scores."""
    return _Table(turn, gold, functions).match()


class _Table:
    """Each call of a turn against each gold call."""

    def __init__(self, turn: ParsedTurn, gold: list[Call], functions: dict[str, dict[str, Any]]) -> None:
        self.turn, self.gold, self.functions = turn, gold, functions
        self.format_errors = [_format_errors(turn, call) for call in turn.calls]
        by_schema = [
            schema_differences(call.arguments or {}, functions[call.name]["parameters"])
            if call.name in functions
            else []
            for call in turn.calls
        ]
        self.differences = [
            [
                _readable(call, all_differences(known, call.arguments or {}, wanted.arguments))
                if call.name == wanted.name
                else _readable(call, known)
                for wanted in gold
            ]
            for call, known in zip(turn.calls, by_schema, strict=True)
        ]

    def tool_error(self, i: int, j: int) -> str | None:
        name = self.turn.calls[i].name
        if name is None or name == self.gold[j].name:
            return None
        return "tool.wrong" if name in self.functions else "tool.unknown"

    def score(self, i: int, j: int) -> float:
        tool_error = self.tool_error(i, j)
        codes = [error.code for error in self.format_errors[i]] + [d.code for d in self.differences[i][j]]
        return _share(codes + [tool_error] if tool_error else codes)

    def match(self) -> list[tuple[int, int]]:
        """Among equal sums, calls of the same name and in the same order go together."""
        return best_assignment(
            [
                [
                    self.score(i, j) + 1e-6 * (call.name == wanted.name) - 1e-10 * abs(i - j)
                    for j, wanted in enumerate(self.gold)
                ]
                for i, call in enumerate(self.turn.calls)
            ]
        )

    def errors(self, i: int, j: int) -> list[Error]:
        call, tool_error = self.turn.calls[i], self.tool_error(i, j)
        found = list(self.format_errors[i])
        if tool_error:
            found.append(Error(tool_error, i, expected=self.gold[j].name, got=call.name, span=call.name_span))
        for d in self.differences[i][j]:
            span = _difference_span(self.turn.text, call, d)
            found.append(Error(d.code, i, pointer(d.path), d.expected, d.got, span))
        return found


def _share(codes: Iterable[str]) -> float:
    return math.prod(1.0 - PENALTY[code] for code in codes)


def _record(call: ParsedCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}


def _format_error(code: str, call: int, span: Span, message: str) -> Error:
    return Error(code, call, got=message, span=span)


def _format_errors(turn: ParsedTurn, call: ParsedCall) -> list[Error]:
    """What is wrong with a call's text whatever the gold call is, keys that come twice included."""
    found = [_format_error(e.code, e.call, e.span, e.message) for e in turn.errors if e.call == call.index]
    for where, twice in call.duplicates:
        assert twice.key_span is not None  # only keys come twice
        span = with_comma(turn.text, (twice.key_span[0], twice.value_span[1]))
        found.append(Error("param.duplicate", call.index, where, got=twice.value, span=span))
    return found


def _readable(call: ParsedCall, differences: list[Difference]) -> list[Difference]:
    """Where the text broke off inside the arguments, nothing is known of what would have followed."""
    if call.complete or call.close_span is not None:
        return differences
    return [
        d
        for d in differences
        if not d.code.startswith("param.missing")
        and not (d.code.startswith("value.") and isinstance(d.got, dict | list))
    ]


def _difference_span(text: str, call: ParsedCall, difference: Difference) -> Span | None:
    """A missing parameter is at the brace that ends its object; a surplus one is key, value, comma; else the value."""
    if difference.code.startswith("param.missing"):
        parent = call.fields.get(pointer(difference.path[:-1]))
        if len(difference.path) == 1 or parent is None:
            return call.close_span
        return parent.value_span[1] - 1, parent.value_span[1]
    part = call.fields.get(pointer(difference.path))
    if part is None:
        return None
    if difference.code.startswith("param.") and part.key_span is not None:
        return with_comma(text, (part.key_span[0], part.value_span[1]))
    return part.value_span


def with_comma(text: str, span: Span) -> Span:
    """The span of a key and its value together with the comma behind it or, at the end of an object, before it."""
    start, end = span
    behind = len(text) - len(text[end:].lstrip())
    if text.startswith(",", behind):
        return start, behind + 1
    before = len(text[:start].rstrip())
    return (before - 1, end) if text.endswith(",", 0, before) else span
