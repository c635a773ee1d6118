"""Tool calls as Hermes and Qwen models write them: `<tool_call>\\n{"name": .., "arguments": {..}}\\n</tool_call>`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ttpa.tools.dialects.dialect import Dialect
from ttpa.tools.dialects.json_calls import FENCE, new_call, read_object
from ttpa.tools.json_scan import Scan, scan
from ttpa.tools.turn import FormatError, ParsedTurn

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_MARK = re.compile(rf"""{OPEN}|{CLOSE}|\{{\s*["']name["']\s*:""")
_CLOSES = re.compile(rf"\s*{CLOSE}")
_ONLY_FENCE = re.compile(r"\s*(?:```\w*\s*)?")


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
    text = turn.text
    call, report = new_call(turn)
    if start == body:
        report("envelope", (start, start + 1), f"{OPEN} is missing")
    fence = FENCE.match(text, body)
    if fence:
        report("repairable", fence.span(1), "a fence around the call")
    read = scan(text, fence.end() if fence else body)
    fence_end = FENCE.match(text, read.end) if fence else None
    rest_start = fence_end.end() if fence_end else read.end
    close = text.find(CLOSE, rest_start)
    other = text.find(OPEN, rest_start, close if close >= 0 else len(text))
    closed = close >= 0 and other < 0
    body_end = close if closed else other if other >= 0 else len(text)

    read_object(call, read, text, report, ("arguments",))
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


HERMES = Dialect("hermes", parse, marks=(OPEN, CLOSE))
