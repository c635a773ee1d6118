"""Where in the text an error stands."""

from __future__ import annotations

from ttpa.esm.differences import Difference
from ttpa.tools.hermes import ParsedCall
from ttpa.tools.json_scan import Span, pointer


def difference_span(text: str, call: ParsedCall, difference: Difference) -> Span | None:
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
