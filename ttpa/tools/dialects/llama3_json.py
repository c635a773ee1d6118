"""Tool calls as Llama 3 models write them: `{"name": .., "parameters": {..}}`, without tags around it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ttpa.tools.dialects.dialect import Dialect
from ttpa.tools.dialects.json_calls import Form, read_calls, skip_space
from ttpa.tools.json_scan import Scan, scan
from ttpa.tools.turn import FormatError, ParsedTurn

OPEN = "<|python_tag|>"
TEXT_OPEN, TEXT_CLOSE = "<|python_start|>", "<|python_end|>"
_TEXT_OPEN, _TEXT_CLOSE = map(re.escape, (TEXT_OPEN, TEXT_CLOSE))
_MARK = re.compile(
    rf"""{re.escape(OPEN)}|(?P<text>(?:{_TEXT_OPEN})?{_TEXT_CLOSE})?(?:```\w*\s*)?(?P<json>(?:\[\s*)?\{{\s*["'])"""
)
_NAMED = re.compile(r"""(?:\[\s*)?\{\s*["']name["']\s*:""")
_SEMICOLON = re.compile(r"\s*;\s*")
_ENDS = re.compile(r"\s*(?:```\s*)?(?:;|\Z)")
_FORM = Form(
    in_list=False,
    keys=("parameters", "arguments"),
    stop=re.compile(rf"""{re.escape(OPEN)}|;\s*\{{\s*["']"""),
)


def parse(text: str, tools: Sequence[dict[str, Any]] = ()) -> ParsedTurn:
    """Find the calls in a model's turn. Never raises; what cannot be read becomes a FormatError with its position.

    The end-of-turn token must be stripped before. What follows `<|python_tag|>`, or a `;` behind a call, is a call. So
    is an object with a name and parameters, or a list of such, that begins the turn or a line, follows a call or the
    tags in which Llama 4's template puts the text before calls, or ends the turn; one that breaks off must have come to
    its name. Between calls stands a `;` or, as the JSON templates for Llama 4 have it, nothing: lists, commas, line
    ends, fences and the key `arguments` are read, and reported. A broken call ends before the next `;` with an object
    behind it.
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
            alone = mark["text"] or start == next_start or _begins_line(text, start)
            alone = alone or (not read.error and _ENDS.match(text, read.end))
            if not alone or not _is_call(text, body, read):
                tag = text.find(OPEN, body, read.end)
                at = max(at, read.end) if tag < 0 else tag
                continue
            at = mark.end("text") if mark["text"] else start
        if turn.calls and start == next_start:
            if start > done:
                message = "white space or a comma instead of ';' between two calls"
                turn.errors.append(FormatError("format.repairable", len(turn.calls), (done, start), message))
            start = done
        before = text[done:start]
        kept.append(before.lstrip().removeprefix(TEXT_OPEN) if mark["text"] else before)
        done = at = _read_chain(turn, start, at)
        next_start = skip_space(text, done)
        if text.startswith(",", next_start):
            next_start = skip_space(text, next_start + 1)
    turn.content = "".join([*kept, text[done:]]).strip()
    return turn


def _is_call(text: str, start: int, read: Scan) -> bool:
    """Whether the object at `start`, or the first one of the list, is meant as a call."""
    value = read.root
    if value is not None and value.items:
        value = value.items[0]
    if value is None or not isinstance(value.value, dict):
        return False
    keys = value.value.keys()
    if not value.closed:
        return "name" in keys or bool(_NAMED.match(text, start))
    return keys == {"name"} or ("name" in keys and not keys.isdisjoint(_FORM.keys))


def _begins_line(text: str, start: int) -> bool:
    while text[start - 1 : start] in (" ", "\t"):
        start -= 1
    return text[start - 1 : start] == "\n"


def _read_chain(turn: ParsedTurn, start: int, body: int) -> int:
    """Read the call, or the list of calls, at `body`, and those that a `;` joins to it; return where the last ends."""
    text = turn.text
    end = read_calls(turn, start, body, _FORM)
    while semicolon := _SEMICOLON.match(text, end):
        start, end = end, semicolon.end()
        if end == len(text):
            call = turn.calls[-1]
            turn.errors.append(FormatError("format.repairable", call.index, (start, end), "a ';' behind the last call"))
            assert call.span is not None
            call.span = (call.span[0], end)
            break
        body = end + len(OPEN) if text.startswith(OPEN, end) else end
        end = read_calls(turn, start, body, _FORM)
    return end


LLAMA3_JSON = Dialect("llama3_json", parse, marks=(OPEN, TEXT_OPEN, TEXT_CLOSE))
