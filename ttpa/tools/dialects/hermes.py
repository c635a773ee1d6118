"""Tool calls as Hermes and Qwen models write them: `<tool_call>\\n{"name": .., "arguments": {..}}\\n</tool_call>`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ttpa.tools.dialects.dialect import Dialect
from ttpa.tools.json_scan import Member, Scan, Span, Value, pointer, scan
from ttpa.tools.turn import Field, FormatError, ParsedCall, ParsedTurn

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_MARK = re.compile(rf"""{OPEN}|{CLOSE}|\{{\s*["']name["']\s*:""")
_FENCE = re.compile(r"\s*(```\w*)")
_CLOSES = re.compile(rf"\s*{CLOSE}")
_ONLY_FENCE = re.compile(r"\s*(?:```\w*\s*)?")
_ESCAPED_CHARACTER = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.|.", re.DOTALL
)


def parse(text: str, tools: Sequence[dict[str, Any]] = ()) -> ParsedTurn:
    """Find the calls in a model's turn. Never raises; what cannot be read becomes a FormatError with its position.

    The end-of-turn token must be stripped before. A call starts at `<tool_call>`, or without the tag at an object with
    name and arguments that stands alone or before a `</tool_call>`; its end is found by reading its JSON, so a tag
    inside a string is text. Where the JSON is broken, the call ends at the next tag after the break.
    """
    turn = ParsedTurn(text, [], [], "")
    kept: list[str] = []
    done = at = 0
    while mark := _MARK.search(text, at):
        start, at = mark.span()
        if mark[0] == CLOSE:
            turn.errors.append(
                FormatError("format.envelope", len(turn.calls) - 1, mark.span(), "a closing tag without a call")
            )
        elif mark[0] == OPEN:
            at = _read_element(turn, start, at)
        else:
            bare = scan(text, start)
            if not _stands_for_call(text, done, start, bare):
                tag = text.find(OPEN, start, bare.end)
                at = bare.end if tag < 0 else tag
                continue
            at = _read_element(turn, start, start)
        kept.append(text[done:start])
        done = at
    turn.content = "".join([*kept, text[done:]]).strip()
    return turn


def _stands_for_call(text: str, done: int, start: int, bare: Scan) -> bool:
    """Whether an object without an opening tag is meant as a call and not as part of an explanation."""
    if bare.error or bare.root is None or not {"name", "arguments"} <= bare.root.value.keys():
        return False
    return bool(_ONLY_FENCE.fullmatch(text, done, start)) or bool(_CLOSES.match(text, bare.end))


def _read_element(turn: ParsedTurn, start: int, body: int) -> int:
    """Read the call that starts at `start` and whose body starts at `body`; return where it ends."""
    text, call = turn.text, ParsedCall(len(turn.calls), None, None)
    turn.calls.append(call)

    def report(kind: str, span: Span, message: str) -> None:
        turn.errors.append(FormatError(f"format.{kind}", call.index, span, message))

    if start == body:
        report("envelope", (start, start + 1), f"{OPEN} is missing")
    fence = _FENCE.match(text, body)
    if fence:
        report("repairable", fence.span(1), "a fence around the call")
    read = scan(text, fence.end() if fence else body)
    fence_end = _FENCE.match(text, read.end) if fence else None
    rest_start = fence_end.end() if fence_end else read.end
    close = text.find(CLOSE, rest_start)
    other = text.find(OPEN, rest_start, close if close >= 0 else len(text))
    closed = close >= 0 and other < 0
    body_end = close if closed else other if other >= 0 else len(text)

    call.complete = read.error is None
    if read.loose:
        report("repairable", read.loose[0], "Python's quotes or words instead of JSON's")
    if read.root is not None:
        _read_envelope(call, read.root, text, report)
    if read.error:
        report("unparseable", (read.error.position, body_end), read.error.message)
        end = body_end
    elif closed and text[rest_start:close].strip():
        extra = close - len(text[rest_start:close].lstrip())
        report("unparseable", (extra, close), "text between the call and its closing tag")
        end = close
    else:
        end = close if closed else rest_start
        if not closed:
            report("envelope", (end, end), f"{CLOSE} is missing")
    call.span = (start, end + len(CLOSE) if closed else end)
    call.inner_span = (body, end)
    return call.span[1]


def _read_envelope(call: ParsedCall, root: Value, text: str, report: Callable[[str, Span, str], None]) -> None:
    """Fill in name and arguments from the JSON of a call, and report what is wrong with them."""
    if not isinstance(root.value, dict):
        return report("unparseable", root.span, "a call must be an object")
    parts: dict[str, Member] = {}
    for member in root.members:
        if member.key in parts:
            report("envelope", member.key_span, f"{member.key!r} comes twice")
        parts[member.key] = member
    brace = (root.span[1] - 1, root.span[1])

    if "name" in parts and isinstance(parts["name"].value.value, str):
        call.name, call.name_span = parts["name"].value.value, parts["name"].value.span
    elif "name" in parts:
        report("unparseable", parts["name"].value.span, "the name must be a string")
    elif root.closed:
        report("unparseable", brace, "the call has no name")

    if "arguments" not in parts:
        if root.closed:
            call.close_span = brace
            report("envelope", brace, "the call has no arguments")
        return None
    arguments = parts["arguments"].value
    place: Callable[[int], int] = _same_place
    if isinstance(arguments.value, str):
        start, end = arguments.span
        report("repairable", (start, start + 1), "the arguments are JSON text instead of an object")
        inner, place = scan(arguments.value), _places(text, start, end).__getitem__
        if inner.error or arguments.value[inner.end :].strip():
            call.complete = call.complete and inner.error is None
            report("unparseable", (place(inner.end), end), "the text of the arguments is no JSON")
        if inner.root is None:
            return None
        arguments = inner.root
    span = (place(arguments.span[0]), place(arguments.span[1]))
    if arguments.closed:
        call.close_span = (place(arguments.span[1] - 1), span[1])
    if not isinstance(arguments.value, dict):
        return report("envelope", span, "the arguments must be an object")
    call.arguments = arguments.value
    call.fields[""] = Field(None, span, arguments.value)
    _read_fields(call, arguments, [], place)
    return None


def _same_place(position: int) -> int:
    return position


def _places(text: str, start: int, end: int) -> list[int]:
    """For each character of a JSON string that stands at text[start:end], where it stands; last the closing quote."""
    return [m.start() for m in _ESCAPED_CHARACTER.finditer(text, start + 1, end - 1)] + [end - 1]


def _read_fields(call: ParsedCall, parent: Value, path: list[str | int], place: Callable[[int], int]) -> None:
    def put(key: str | int, key_span: Span | None, value: Value) -> tuple[str, Field]:
        name = pointer([*path, key])
        key_span = None if key_span is None else (place(key_span[0]), place(key_span[1]))
        return name, Field(key_span, (place(value.span[0]), place(value.span[1])), value.value)

    last = {member.key: member for member in parent.members}
    seen = set()
    for member in parent.members:
        name, part = put(member.key, member.key_span, member.value)
        if member.key in seen:
            call.duplicates.append((name, part))
        seen.add(member.key)
        if member is last[member.key]:
            call.fields[name] = part
            _read_fields(call, member.value, [*path, member.key], place)
    for index, item in enumerate(parent.items):
        name, part = put(index, None, item)
        call.fields[name] = part
        _read_fields(call, item, [*path, index], place)


HERMES = Dialect("hermes", parse, marks=(OPEN, CLOSE))
