"""Tool calls as Mistral models write them: `[TOOL_CALLS] [{"name": .., "arguments": {..}}, ..]`, or for each call
`[TOOL_CALLS]name[ARGS]{..}`, at times with `[CALL_ID]id` behind the name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ttpa.tools.dialects.dialect import Dialect
from ttpa.tools.dialects.json_calls import (
    Form,
    check_scan,
    end_of_json,
    new_call,
    read_arguments,
    read_calls,
    scan_call,
    skip_space,
)
from ttpa.tools.json_scan import Scan, scan
from ttpa.tools.turn import FormatError, ParsedTurn

OPEN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_OPEN, _CALL_ID, _ARGS = map(re.escape, (OPEN, CALL_ID, ARGS))
_MARK = re.compile(rf"""{_OPEN}|{_ARGS}|(?:```\w*\s*)?(?P<json>(?:\[\s*)?\{{\s*["'])""")
_JSON = re.compile(rf"\s*(?!{_OPEN}|{_CALL_ID}|{_ARGS})(?:\[|\{{|```)")
_BEHIND_NAME = re.compile(rf"{_OPEN}|{_CALL_ID}|{_ARGS}|\{{")
_ID = re.compile(rf"{_CALL_ID}[^\s\[{{]*")
_WORD = re.compile(r"\s*\S*")
_FORM = Form(in_list=True, keys=("arguments",), stop=re.compile(_OPEN))


def parse(text: str, tools: Sequence[dict[str, Any]] = ()) -> ParsedTurn:
    """Find the calls in a model's turn. Never raises; what cannot be read becomes a FormatError with its position.

    The end-of-turn token must be stripped before. What follows `[TOOL_CALLS]` is a call: a list of objects with name
    and arguments (tokenizers of Mistral up to version 7), or a name, the id of the call in version 11, and `[ARGS]`
    before the arguments. Without it, so is such an object or list that begins the turn or follows a call, and a word
    before `[ARGS]`. Where the JSON is broken, the call ends at the next `[TOOL_CALLS]`.
    """
    turn = ParsedTurn(text, [], [], "")
    kept: list[str] = []
    done = at = 0
    next_start = skip_space(text, 0)
    while mark := _MARK.search(text, at):
        start, at = mark.span()
        if mark["json"] is not None:
            body = mark.start("json")
            read = scan(text, body)
            if start != next_start or not _is_call(read):
                tag = text.find(OPEN, body, read.end)
                at = max(at, read.end) if tag < 0 else tag
                continue
            at = start
        elif mark[0] == ARGS:
            while start > done and not text[start - 1].isspace():
                start -= 1
            at = start
        if mark[0] != OPEN:
            turn.errors.append(
                FormatError("format.envelope", len(turn.calls), (start, start + 1), f"{OPEN} is missing")
            )
        kept.append(text[done:start])
        listed = mark[0] != ARGS and _JSON.match(text, at)
        done = at = read_calls(turn, start, at, _FORM) if listed else _read_named(turn, start, at)
        next_start = skip_space(text, done)
    turn.content = "".join([*kept, text[done:]]).strip()
    return turn


def _is_call(read: Scan) -> bool:
    """Whether an object or a list without a mark is meant as calls."""
    if read.error or read.root is None:
        return False
    value = read.root.items[0] if read.root.items else read.root
    return isinstance(value.value, dict) and {"name", "arguments"} <= value.value.keys()


def _read_named(turn: ParsedTurn, start: int, body: int) -> int:
    """Read the call whose name begins at `body`; return where it ends."""
    text = turn.text
    call, report = new_call(turn)
    mark = _BEHIND_NAME.search(text, body)
    if mark is None or mark[0] == OPEN:
        end = mark.start() if mark else len(text)
        word = _WORD.match(text, body, end)
        assert word is not None  # it matches the empty text
        report("unparseable", (word.end(), end), f"{ARGS} is missing")
        call.complete = False
    else:
        name = text[body : mark.start()].strip()
        if name:
            first = skip_space(text, body)
            call.name, call.name_span = name, (first, first + len(name))
        else:
            report("unparseable", mark.span(), "the call has no name")
        call_id = _ID.match(text, mark.start())
        at = call_id.end() if call_id else mark.start()
        if text.startswith(ARGS, at):
            at += len(ARGS)
        else:
            report("envelope", (at, at), f"{ARGS} is missing")
        read = scan_call(text, at, _FORM.stop)
        check_scan(call, read, report)
        if read.root is not None:
            read_arguments(call, read.root, text, report)
        end = end_of_json(text, read, _FORM.stop, report)
    call.span, call.inner_span = (start, end), (body, end)
    return end


MISTRAL = Dialect("mistral", parse, marks=(OPEN, CALL_ID, ARGS))
