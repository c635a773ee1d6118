"""What each character of a model's turn is: a name, a key or a value of a call, what stands around them, or text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ttpa.tools.json_scan import Span
from ttpa.tools.schema import functions, schema_at
from ttpa.tools.turn import ParsedCall, ParsedTurn


def character_fields(turn: ParsedTurn, tools: Sequence[dict[str, Any]]) -> list[str | None]:
    """The field class of each character of a turn, None outside of calls.

    `name` and `key` (quotes included); `value` is a number, a word (true, null) or one of an enum, `string` any other
    string; `bracket` is the rest of a call; `tag` is one of the two tags around it. What could not be read is `other`:
    the rest of a call that breaks off, and the whole of one that was read without positions.
    """
    fields: list[str | None] = [None] * len(turn.text)
    schemas = functions(tools)
    for call in turn.calls:
        _mark_call(fields, call, schemas.get(call.name or "", {}).get("parameters", {}))
    return fields


def _mark_call(fields: list[str | None], call: ParsedCall, parameters: dict[str, Any]) -> None:
    def mark(field: str, span: Span) -> None:
        fields[span[0] : span[1]] = [field] * (span[1] - span[0])

    assert call.span is not None  # the call was read from text
    if call.inner_span is None:
        return mark("other", call.span)
    mark("tag", call.span)
    mark("bracket" if call.complete else "other", call.inner_span)
    if call.name_span is not None:
        mark("name", call.name_span)
    for pointer, field in call.fields.items():
        if field.key_span is not None:
            mark("key", field.key_span)
        if isinstance(field.value, dict | list):
            if not call.complete:
                mark("bracket", field.value_span)
            continue
        listed = "enum" in schema_at(parameters, _path(pointer, call.arguments))
        mark("string" if isinstance(field.value, str) and not listed else "value", field.value_span)
    return None


def _path(pointer: str, arguments: Any) -> list[str | int]:
    """The parts of a JSON pointer into the arguments, indexes of lists as numbers."""
    path: list[str | int] = []
    for part in pointer.split("/")[1:]:
        key: str | int = part.replace("~1", "/").replace("~0", "~")
        if isinstance(arguments, list):
            key = int(key)
        arguments = arguments[key]
        path.append(key)
    return path
