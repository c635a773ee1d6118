"""The preset `strict`: all errors of a turn, each with its place, and a score that only an exact turn has in full."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttpa.esm.differences import Difference, all_differences, schema_differences
from ttpa.esm.errors import PENALTY, Error, Score, share
from ttpa.esm.matching import best_assignment
from ttpa.esm.places import difference_span, name_place, with_comma
from ttpa.tools.call import Call, normal_json
from ttpa.tools.json_scan import Span, pointer
from ttpa.tools.turn import ParsedCall, ParsedTurn


def strict(
    turn: ParsedTurn,
    gold: list[Call],
    functions: dict[str, dict[str, Any]],
    penalty: Mapping[str, float] = PENALTY,
) -> Score:
    """Find every error of a turn and score it.

    A call that is matched to a gold call scores prod_e (1 - penalty(e)) over its errors e, with `errors.PENALTY`: 0 for
    a fatal error, half for a major one, nine tenths for a minor one. The turn scores sum_calls / (#matched + sum_u
    penalty(u)) under the matching with the greatest sum, u being the calls that are missing or too many: each takes an
    equal share. Errors that belong to no call multiply the whole, and so do unwanted_call and no_call, with which the
    score is 0. The score is 1.0 exactly if there is no error. Another `penalty` table may weigh every code otherwise;
    one of penalty 0 does not count and is not listed. (Our own design; the released formula is in `release`.)
    """
    errors = [_format_error(e.code, e.call, e.span, e.message) for e in turn.errors if e.call < 0]
    end = (len(turn.text), len(turn.text))
    if not gold or not turn.calls:
        for call in turn.calls:
            errors += _format_errors(turn, call)
            errors.append(Error("unwanted_call", call.index, got=_record(call), span=call.span))
        if gold:
            errors.append(Error("no_call", 0, expected=gold[0].to_dict(), span=end))
        return _score(share((error.code for error in errors), penalty), errors, penalty)

    whole = share((error.code for error in errors), penalty)
    table = _Table(turn, gold, functions, penalty)
    pairs = table.match()
    gold_of = dict(pairs)
    seen = {normal_json(_record(turn.calls[i])) for i in gold_of}
    unmatched: list[Error] = []
    for call in turn.calls:
        if call.index in gold_of:
            errors += table.errors(call.index, gold_of[call.index])
        else:
            normal = normal_json(_record(call))
            code = "call.repeated" if normal in seen else "call.extra"
            seen.add(normal)
            errors += _format_errors(turn, call)
            unmatched.append(Error(code, call.index, got=_record(call), span=call.span))
            errors.append(unmatched[-1])
    for index in sorted(set(range(len(gold))) - set(gold_of.values())):
        unmatched.append(Error("call.missing", index, expected=gold[index].to_dict(), span=end))
        errors.append(unmatched[-1])
    total = sum(table.score(i, j) for i, j in pairs)
    return _score(whole * total / (len(pairs) + sum(penalty[e.code] for e in unmatched)), errors, penalty)


def match(turn: ParsedTurn, gold: list[Call], functions: dict[str, dict[str, Any]]) -> list[tuple[int, int]]:
    """Pairs (call, gold call) of the matching with the greatest sum of strict scores."""
    return _Table(turn, gold, functions, PENALTY).match()


class _Table:
    """Each call of a turn against each gold call."""

    def __init__(
        self,
        turn: ParsedTurn,
        gold: list[Call],
        functions: dict[str, dict[str, Any]],
        penalty: Mapping[str, float],
    ) -> None:
        self.turn, self.gold, self.functions, self.penalty = turn, gold, functions, penalty
        self.format_errors = [_format_errors(turn, call) for call in turn.calls]
        self.differences = []
        for call in turn.calls:
            arguments = call.arguments or {}
            parameters = functions[call.name]["parameters"] if call.name in functions else {}
            known = schema_differences(arguments, parameters)
            self.differences.append(
                [
                    _readable(
                        call,
                        all_differences(known, arguments, wanted.arguments, parameters)
                        if call.name == wanted.name
                        else known,
                    )
                    for wanted in gold
                ]
            )

    def tool_error(self, i: int, j: int) -> str | None:
        name = self.turn.calls[i].name
        if name is None or name == self.gold[j].name:
            return None
        return "tool.wrong" if name in self.functions else "tool.unknown"

    def score(self, i: int, j: int) -> float:
        tool_error = self.tool_error(i, j)
        codes = [error.code for error in self.format_errors[i]] + [d.code for d in self.differences[i][j]]
        return share(codes + [tool_error] if tool_error else codes, self.penalty)

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
            found.append(Error(tool_error, i, expected=self.gold[j].name, got=call.name, span=name_place(call)))
        for d in self.differences[i][j]:
            span = difference_span(self.turn.text, call, d)
            found.append(Error(d.code, i, pointer(d.path), d.expected, d.got, span))
        return found


def _score(score: float, errors: list[Error], penalty: Mapping[str, float]) -> Score:
    counted = [error for error in errors if penalty[error.code] > 0.0]
    return Score(score, not counted, counted)


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
