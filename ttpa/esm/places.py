"""Where in the text an error stands."""

from __future__ import annotations

from ttpa.esm.differences import Difference
from ttpa.tools.json_scan import Span, pointer
from ttpa.tools.turn import Field, ParsedCall


def difference_span(text: str, call: ParsedCall, difference: Difference) -> Span | None:
    """A missing parameter is at the bracket or tag that ends its object, or where the call ends if there is none; a
    surplus one is key, value, comma, or its element; else the value. In a call that was read without positions
    everything is the whole call."""
    if call.inner_span is None:
        return call.span
    if difference.code.startswith("param.missing"):
        parent = call.fields.get(pointer(difference.path[:-1]))
        if len(difference.path) == 1 or parent is None:
            return call.close_span or (call.inner_span[1], call.inner_span[1])
        return parent.value_span[1] - 1, parent.value_span[1]
    part = call.fields.get(pointer(difference.path))
    if part is None:
        return None
    whole = member_span(text, part) if difference.code.startswith("param.") else None
    return part.value_span if whole is None else whole


def name_place(call: ParsedCall) -> Span | None:
    """Where the name of a call stands: of one that was read without positions, the whole call."""
    return call.name_span or call.span


def member_span(text: str, field: Field) -> Span | None:
    """The span of a parameter with its key, and its comma or tags; None for an item of an array."""
    if field.element_span is not None or field.key_span is None:
        return field.element_span
    return with_comma(text, (field.key_span[0], field.value_span[1]))


def with_comma(text: str, span: Span) -> Span:
    """The span of a key and its value together with the comma behind it or, at the end of an object, before it."""
    start, end = span
    behind = len(text) - len(text[end:].lstrip())
    if text.startswith(",", behind):
        return start, behind + 1
    before = len(text[:start].rstrip())
    return (before - 1, end) if text.endswith(",", 0, before) else span
