"""The preset `bfcl`: the verdict of the Berkeley leaderboard's checker, and every error in its place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ttpa.errors import InputError
from ttpa.esm.differences import Difference
from ttpa.esm.errors import PENALTY, Error, Score, share
from ttpa.esm.matching import best_assignment
from ttpa.esm.places import difference_span, name_place
from ttpa.tools.json_scan import pointer
from ttpa.tools.turn import ParsedCall, ParsedTurn

_KINDS: dict[Any, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
    "number": float,  # JSON Schema's own words for float and dict
    "object": dict,
}
_IGNORED = re.compile(r"[ ,./\-_*^]")
_MATCH_ERROR = "parallel_function_checker_no_order:cannot_find_match"

Alternatives = dict[str, list[Any]]


def bfcl(turn: ParsedTurn, gold: Sequence[Any], tools: Sequence[Any]) -> Score:
    """Score a turn 1 or 0 by the rules of BFCL's checker for Python calls, and list all errors by these rules.

    `gold` is BFCL's `possible_answer`: one `{name: {parameter: [alternative, ...]}}` per call, where the alternative ""
    means that the parameter may be left out. `tools` are BFCL's function records or OpenAI tools. Several gold calls
    are matched in any order, greedily in the order of gold as BFCL does; what is left over is matched with the fewest
    errors. Text that is not well formed fails as in BFCL's decoder, and nothing more is looked at; without gold calls
    it counts as no call. An error's `error_type` is BFCL's name for it, the first error's the one that BFCL reports. A
    type that BFCL does not know, with which its checker crashes, leaves plain equality with an alternative. Raises
    InputError for other gold and tools. Source: bfcl-eval 2026.3.23, `ast_checker.py`.
    """
    functions, wanted = _functions(tools), _wanted(gold)
    for name, _ in wanted:
        if name not in functions:
            raise InputError(f"gold calls the tool {name!r}, which is not among the tools: {', '.join(functions)}")
    if turn.errors:
        broken = [Error(e.code, e.call, got=e.message, span=e.span) for e in turn.errors] if gold else []
        return _score([replace(error, error_type="ast_decoder:decoder_failed") for error in broken])
    if not wanted:
        unwanted = [Error("unwanted_call", call.index, got=_record(call), span=call.span) for call in turn.calls]
        return _score([replace(error, error_type="irrelevance_error:decoder_success") for error in unwanted])

    table = [[list(_call_errors(turn, call, *answer, functions)) for answer in wanted] for call in turn.calls]
    partner: dict[int, int] = {}
    for j in range(len(wanted)):
        right = next((i for i, row in enumerate(table) if i not in partner and not row[j]), None)
        if right is not None:
            partner[right] = j
    rows = [i for i in range(len(table)) if i not in partner]
    columns = [j for j in range(len(wanted)) if j not in partner.values()]
    scores = [[share((error.code for error in table[i][j]), PENALTY) for j in columns] for i in rows]
    partner |= {rows[row]: columns[column] for row, column in best_assignment(scores)}

    errors = list(_count_errors(turn, wanted, partner, len(functions)))
    for i, j in sorted(partner.items()):
        errors += [replace(e, error_type=_MATCH_ERROR) for e in table[i][j]] if len(wanted) > 1 else table[i][j]
    return _score(errors)


def _score(errors: list[Error]) -> Score:
    return Score(float(not errors), not errors, errors)


def _record(call: ParsedCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}


def _count_errors(
    turn: ParsedTurn, wanted: list[tuple[str, Alternatives]], partner: dict[int, int], num_tools: int
) -> Iterator[Error]:
    checker = "parallel_function_checker_no_order" if len(wanted) > 1 else "multiple_function_checker"
    kind = f"{checker if len(wanted) > 1 or num_tools > 1 else 'simple_function_checker'}:wrong_count"
    end = (len(turn.text), len(turn.text))
    for call in turn.calls:
        if call.index not in partner:
            repeated = any(_record(call) == _record(turn.calls[i]) for i in partner)
            code = "call.repeated" if repeated else "call.extra"
            yield Error(code, call.index, got=_record(call), span=call.span, error_type=kind)
    for j, (name, alternatives) in enumerate(wanted):
        if j not in partner.values():
            code = "call.missing" if turn.calls else "no_call"
            yield Error(code, j, expected={name: alternatives}, span=end, error_type=kind)


def _call_errors(
    turn: ParsedTurn, call: ParsedCall, name: str, alternatives: Alternatives, functions: dict[str, dict[str, Any]]
) -> Iterator[Error]:
    """All errors of one call against one gold call; the first is the one at which BFCL stops."""
    properties, required = functions[name]["properties"], functions[name]["required"]
    given = call.arguments or {}

    def error(code: str, error_type: str, key: str, expected: Any) -> Error:
        span = difference_span(turn.text, call, Difference(code, (key,), expected, given.get(key)))
        return Error(code, call.index, pointer([key]), expected, given.get(key), span, error_type=error_type)

    if call.name != name:
        code = "tool.wrong" if call.name in functions else "tool.unknown"
        kind = "simple_function_checker:wrong_func_name"
        yield Error(code, call.index, expected=name, got=call.name, span=name_place(call), error_type=kind)
        return
    for key in required:
        if key not in given:
            yield error(
                "param.missing_required", "simple_function_checker:missing_required", key, alternatives.get(key)
            )
    for key, value in given.items():
        if key not in properties or key not in alternatives:
            code = "param.unexpected" if key in properties else "param.unknown"
            yield error(code, "simple_function_checker:unexpected_param", key, None)
        elif wrong := argument_error(value, alternatives[key], properties[key]):
            is_type = wrong.startswith("type_error")
            expected = {"type": properties[key]["type"]} if is_type else alternatives[key]
            yield error("value.type" if is_type else "value.wrong", wrong, key, expected)
    for key, values in alternatives.items():
        if key not in given and key not in required and "" not in values:
            yield error("param.missing_expected", "simple_function_checker:missing_optional", key, values)


def argument_error(value: Any, alternatives: list[Any], schema: dict[str, Any]) -> str | None:
    """BFCL's name for what is wrong with an argument of this schema, None if it equals one of the alternatives.

    Texts compare without case, spaces and `,./-_*^`, with ' as "; types exactly, but an int may stand for a float.
    """
    word, kind = schema.get("type"), _kind(schema)
    inner = _kind(schema.get("items")) if word in ("array", "tuple") else None
    if word == "tuple" and isinstance(value, tuple):
        value = list(value)
    if kind is float and type(value) is int and abs(value) < 2**1023:
        value = float(value)
    if kind is not None:
        wrong, is_variable = _type_error(value, alternatives, kind, inner)
        if wrong:
            return wrong
        if not is_variable:
            if kind is dict:
                return _dict_error(value, alternatives)
            if kind is list and inner is dict:
                return _dicts_error(value, alternatives)
            if kind is str:
                texts = [_standard(a) for a in alternatives if isinstance(a, str)]
                return None if _standard(value) in texts else "value_error:string"
            if kind is list:
                lists = [[_standard(part) for part in a] for a in alternatives if isinstance(a, str | list)]
                return None if [_standard(part) for part in value] in lists else "value_error:list/tuple"
    return None if value in alternatives else "value_error:others"


def _kind(schema: Any) -> type | None:
    word = schema.get("type") if isinstance(schema, dict) else None
    return _KINDS.get(word) if isinstance(word, str) else None


def _type_error(value: Any, alternatives: list[Any], kind: type, inner: type | None) -> tuple[str | None, bool]:
    """The type error if any, and whether the value is what BFCL calls a variable: of another type than the schema says
    but of the first alternative's, so that nothing but equality counts. Items are checked one level deep."""
    first, given = next((type(a) for a in alternatives if a != ""), None), type(value)
    if given is kind:
        if inner is None or any(
            not isinstance(a, list) or all(_type_error(item, a, inner, None)[0] is None for item in value)
            for a in alternatives
        ):
            return None, first not in (None, kind)
        return ("type_error:nested" if first is kind else "type_error:simple"), False
    return (None, True) if first is given else ("type_error:simple", False)


def _dict_error(value: Any, alternatives: list[Any]) -> str | None:
    """BFCL reports what the last alternative says."""
    reported: str | None = "dict_checker:unclear"
    for alternative in alternatives:
        if isinstance(alternative, dict):
            reported = _one_dict_error(value, alternative)
            if reported is None:
                return None
    return reported


def _one_dict_error(value: Any, alternative: dict[str, Any]) -> str | None:
    if not isinstance(value, dict):
        return "value_error:dict_value"
    allowed = {key: part if isinstance(part, list) else [part] for key, part in alternative.items()}
    if any(key not in value and "" not in parts for key, parts in allowed.items()):
        return "value_error:dict_key"
    for key, part in value.items():
        if key not in allowed:
            return "value_error:dict_key"
        if _standard(part) not in [_standard(a) for a in allowed[key]]:
            return "value_error:dict_value"
    return None


def _dicts_error(value: list[Any], alternatives: list[Any]) -> str | None:
    reported: str | None = "list_dict_checker:unclear"
    for alternative in alternatives:
        if not isinstance(alternative, str | list) or len(alternative) != len(value):
            reported = "value_error:list_dict_count"
            continue
        wrong = (_dict_error(part, [a]) for part, a in zip(value, alternative, strict=True))
        reported = next((error for error in wrong if error), None)
        if reported is None:
            return None
    return reported


def _standard(value: Any) -> Any:
    return _IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value


def _functions(tools: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Properties and required names by tool; BFCL's types are no JSON Schema, so `tools.schema.functions` cannot."""
    found: dict[str, dict[str, Any]] = {}
    for index, tool in enumerate(tools):
        bare = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(bare, dict) or not isinstance(bare.get("name"), str):
            raise InputError(f'tool {index} has no function "name"')
        parameters = bare.get("parameters") or {}
        properties = parameters.get("properties") or {} if isinstance(parameters, dict) else None
        required = parameters.get("required") or [] if isinstance(parameters, dict) else None
        if not isinstance(properties, dict) or not all(isinstance(schema, dict) for schema in properties.values()):
            raise InputError(f"tool {bare['name']!r}: parameters must be an object of properties, each an object")
        if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
            raise InputError(f"tool {bare['name']!r}: required must be a list of names")
        found[bare["name"]] = {"properties": properties, "required": required}
    return found


def _wanted(gold: Sequence[Any]) -> list[tuple[str, Alternatives]]:
    wanted: list[tuple[str, Alternatives]] = []
    for index, record in enumerate(gold):
        name, answers = next(iter(record.items())) if isinstance(record, dict) and len(record) == 1 else (None, None)
        if not isinstance(answers, dict) or not all(isinstance(values, list) for values in answers.values()):
            raise InputError(
                f"gold call {index} must be {{name: {{parameter: [alternative, ...]}}}}, as in BFCL's possible_answer"
            )
        wanted.append((str(name), answers))
    return wanted
