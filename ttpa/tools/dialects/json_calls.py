"""What dialects that write calls as JSON have in common: objects of a name and arguments, one or a list of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ttpa.tools.json_scan import JsonError, Member, Scan, Span, Value, pointer, scan
from ttpa.tools.turn import Field, FormatError, ParsedCall, ParsedTurn

Report = Callable[[str, Span, str], None]


@dataclass(frozen=True)
class Form:
    """How a dialect writes its calls: in a list or one by one, the arguments under `keys[0]` (other keys are read in
    its place, and reported); `stop` finds what is never inside a call, so that a broken one ends there."""

    in_list: bool
    keys: tuple[str, ...]
    stop: re.Pattern[str]


FENCE = re.compile(r"\s*(```\w*)")
_SPACE = re.compile(r"\s*")
_SURPLUS = re.compile(r"\s*([}\]]+)")
_SURPLUS_IN_LIST = re.compile(r"\s*(}+)")
_ESCAPED_CHARACTER = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.|.", re.DOTALL
)


def new_call(turn: ParsedTurn) -> tuple[ParsedCall, Report]:
    """Append an empty call to a turn, and return it with the function that reports its errors: kind, span, message."""
    call = ParsedCall(len(turn.calls), None, None)
    turn.calls.append(call)

    def report(kind: str, span: Span, message: str) -> None:
        turn.errors.append(FormatError(f"format.{kind}", call.index, span, message))

    return call, report


def read_calls(turn: ParsedTurn, start: int, body: int, form: Form) -> int:
    """Read the call, or the list of calls, whose JSON stands at `body`, in a fence or not, and return where it ends.

    The spans of the calls cover everything from `start` to there: the comma before an item of a list belongs to its
    call, the closing bracket to the last one. Behind a break nothing is read before the next match of `form.stop`.
    """
    text, first = turn.text, len(turn.calls)
    fence = FENCE.match(text, body)
    at = skip_space(text, fence.end() if fence else body)
    listed = text.startswith("[", at) and not form.stop.match(text, at)
    at += listed
    while True:
        at = skip_space(text, at)
        call, report = new_call(turn)
        if call.index == first:
            if fence:
                report("repairable", fence.span(1), "a fence around the call")
            if listed and not form.in_list:
                report("repairable", (at - 1, at), "the calls stand in a list")
            elif form.in_list and not listed:
                report("envelope", (at, at), "the list of calls does not begin")
        read = scan_call(text, at, form.stop)
        read_object(call, read, text, report, form.keys)
        end = end_of_json(text, read, form.stop, report, _SURPLUS_IN_LIST if listed else _SURPLUS)
        call.span, call.inner_span = (start, end), (at, end)
        if read.error:
            return end
        if not listed:
            break
        behind = skip_space(text, end)
        if text.startswith(",", behind) and not text.startswith("]", skip_space(text, behind + 1)):
            start, at = end, behind + 1
        elif text.startswith("{", behind):
            report("repairable", (behind, behind + 1), "a comma is missing between two calls")
            start, at = end, behind
        else:
            end = _end_of_list(text, end, report)
            break
    fence_end = FENCE.match(text, end) if fence else None
    call.span = (start, fence_end.end() if fence_end else end)
    return call.span[1]


def read_object(call: ParsedCall, read: Scan, text: str, report: Report, keys: tuple[str, ...]) -> None:
    """Fill in name and arguments from the JSON of a call, and report what is wrong with them. The arguments are called
    `keys[0]`; the other names in `keys` are read in its place, and reported."""
    check_scan(call, read, report)
    root = read.root
    if root is None:
        return None
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

    key = next((key for key in keys if key in parts), None)
    if key is None:
        if root.closed:
            call.close_span = brace
            report("envelope", brace, f"the call has no {keys[0]}")
        return None
    if key != keys[0]:
        report("repairable", parts[key].key_span, f"{key!r} instead of {keys[0]!r}")
    return read_arguments(call, parts[key].value, text, report)


def check_scan(call: ParsedCall, read: Scan, report: Report) -> None:
    """Note whether the JSON of a call was read to its end, and report what in it is Python."""
    call.complete = read.error is None
    if read.loose:
        report("repairable", read.loose[0], "Python's quotes or words instead of JSON's")


def read_arguments(call: ParsedCall, arguments: Value, text: str, report: Report) -> None:
    """Fill in the arguments of a call and its fields; JSON text in their place is read, and reported."""
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
    read_fields(call, arguments, [], place)
    return None


def scan_call(text: str, body: int, stop: re.Pattern[str]) -> Scan:
    """As `scan`, but a match of `stop` that begins like a list is no JSON outside of strings."""
    read = scan(text, body)
    mark = read.error.position - 1 if read.error else -1
    if mark < body or text[mark] != "[" or not stop.match(text, mark):
        return read
    read = scan(text[body:mark])
    assert read.error is not None  # it was broken there at the latest
    if read.root is not None:
        _move(read.root, body)
    error = JsonError(read.error.position + body, read.error.message)
    return Scan(read.root, read.end + body, error, [_moved(span, body) for span in read.loose])


def end_of_json(
    text: str, read: Scan, stop: re.Pattern[str], report: Report, surplus: re.Pattern[str] = _SURPLUS
) -> int:
    """Where a call ends whose JSON was read: behind the brackets that close nothing or, if it is broken, at the next
    match of `stop`; both are reported."""
    if read.error:
        found = stop.search(text, read.error.position)
        end = found.start() if found else len(text)
        report("unparseable", (read.error.position, end), read.error.message)
        return end
    found = surplus.match(text, read.end)
    if found:
        report("unparseable", found.span(1), "brackets that close nothing")
    return found.end() if found else read.end


def skip_space(text: str, position: int) -> int:
    """The position of the next character that is not white space, or the end of the text."""
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]  # matches the empty text


def _end_of_list(text: str, end: int, report: Report) -> int:
    """Where a list ends whose last item ends at `end`."""
    behind = skip_space(text, end)
    if text.startswith(",", behind):
        report("repairable", (behind, behind + 1), "a comma behind the last call")
        behind = skip_space(text, behind + 1)
    if text.startswith("]", behind):
        return behind + 1
    report("envelope", (end, end), "the list of calls does not end")
    return end


def _move(value: Value, by: int) -> None:
    value.span = _moved(value.span, by)
    for member in value.members:
        member.key_span = _moved(member.key_span, by)
    for part in [*value.items, *(member.value for member in value.members)]:
        _move(part, by)


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def _same_place(position: int) -> int:
    return position


def _places(text: str, start: int, end: int) -> list[int]:
    """For each character of a JSON string that stands at text[start:end], where it stands; last the closing quote."""
    return [m.start() for m in _ESCAPED_CHARACTER.finditer(text, start + 1, end - 1)] + [end - 1]


def read_fields(call: ParsedCall, parent: Value, path: list[str | int], place: Callable[[int], int]) -> None:
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
            read_fields(call, member.value, [*path, member.key], place)
    for index, item in enumerate(parent.items):
        name, part = put(index, None, item)
        call.fields[name] = part
        read_fields(call, item, [*path, index], place)
