"""Tool calls as Qwen3-Coder, Qwen3.5 and Nemotron 3 write them: tags around the name and around each value.

<tool_call>
<function=NAME>
<parameter=KEY>
VALUE
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ttpa.tools.dialects.dialect import Dialect
from ttpa.tools.dialects.json_calls import read_fields
from ttpa.tools.json_scan import Span, pointer
from ttpa.tools.turn import Field, FormatError, ParsedCall, ParsedTurn
from ttpa.tools.untyped import parameters_of, typed_value

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_TAG = re.compile(r"</?tool_call>|</?(?:function|parameter)>|<(?:function|parameter)=([^<>\n]+)>")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class _Parameter:
    """One `<parameter>` element: its key, the text of its value, and the whole with the line end behind it."""

    key: str
    key_span: Span
    value_span: Span
    span: Span


def parse(text: str, tools: Sequence[dict[str, Any]] = ()) -> ParsedTurn:
    """Find the calls in a model's turn. Never raises; what cannot be read becomes a FormatError with its position.

    A call starts at `<tool_call>`, or without it at a `<function=NAME>` that another tag follows. A value that starts
    on a line of its own ends at the next tag that starts a line; text in it that looks like a tag is text. The types of
    the values come from the schemas among `tools`, by `ttpa.tools.untyped.typed_value`.
    """
    return _Reader(text, tools).read()


class _Reader:
    """Reads a turn from one tag to the next. The tags that may end a value are found once, so time is linear."""

    def __init__(self, text: str, tools: Sequence[dict[str, Any]]) -> None:
        self.text, self.tools = text, tools
        self.turn = ParsedTurn(text, [], [], "")
        self.tags = list(_TAG.finditer(text))
        self.starts = [tag.start() for tag in self.tags]
        self.outer = [i for i, tag in enumerate(self.tags) if tag[0] in (OPEN, CLOSE)]
        self.on_line = [i for i, start in enumerate(self.starts) if text.startswith("\n", start - 1, start)]
        self.inline = [i for i, tag in enumerate(self.tags) if tag[0] == "</parameter>" and self.stands_last(tag.end())]

    def read(self) -> ParsedTurn:
        kept, done = [], 0
        for tag in self.tags:
            start, end = tag.span()
            if start < done:
                continue
            if tag[0] == CLOSE:
                self.report("envelope", (start, end), "a closing tag without a call")
            elif tag[0] == OPEN:
                end = self.read_call(start, end)
            elif tag[0].startswith("<function=") and self.tag_behind(end):
                end = self.read_call(start, start)
            else:
                continue
            kept.append(self.text[done:start])
            done = end
        self.turn.content = "".join([*kept, self.text[done:]]).strip()
        return self.turn

    def read_call(self, start: int, body: int) -> int:
        """Read the call that starts at `start` and whose body starts at `body`; return where it ends."""
        call = ParsedCall(len(self.turn.calls), None, None)
        self.turn.calls.append(call)
        if start == body:
            self.report("envelope", (start, start + 1), f"{OPEN} is missing")
        end = self.read_function(call, body)
        close = self.tag_behind(end)
        outer = self.first(self.outer, end)
        closed = outer is not None and outer[0] == CLOSE
        if close and close[0].startswith("<function="):
            closed = False
        elif outer is not None and closed:
            extra = self.skip_space(end)
            if call.complete and extra < outer.start():
                self.report("unparseable", (extra, outer.start()), "text between the call and its closing tag")
            end = outer.start()
        if call.complete and not closed:
            self.report("envelope", (end, end), f"{CLOSE} is missing")
        call.span = (start, end + len(CLOSE) if closed else end)
        call.inner_span = (body, end)
        return call.span[1]

    def read_function(self, call: ParsedCall, at: int) -> int:
        """Read name and parameters of a call; return where they end, or where the text goes on after it broke."""
        tag = self.tag_behind(at)
        if tag is None or not tag[0].startswith("<function="):
            return self.breaks(call, self.skip_space(at), "expected <function=NAME>")
        call.name, call.name_span = tag[1], tag.span(1)
        begin = at = tag.end()
        parameters: list[_Parameter] = []
        while True:
            tag = self.tag_behind(at)
            if tag is None or tag[0] == "</parameter>":
                end = self.skip_space(at)
                self.fill(call, parameters, (begin, end))
                return self.breaks(call, end, "expected <parameter=KEY> or </function>")
            if not tag[0].startswith("<parameter="):
                break
            parameter = self.read_parameter(tag)
            if parameter is None:
                self.fill(call, parameters, (begin, tag.end()))
                call.complete = False
                self.report("unparseable", (tag.end(), len(self.text)), f"the value of {tag[1]!r} does not end")
                return len(self.text)
            parameters.append(parameter)
            at = parameter.span[1]
        if tag[0] in ("</function>", CLOSE):
            call.close_span = tag.span()
        if tag[0] == "</function>":
            self.fill(call, parameters, (begin, tag.start()))
            return tag.end()
        self.fill(call, parameters, (begin, at))
        self.report("envelope", (at, at), "</function> is missing")
        return at

    def read_parameter(self, tag: re.Match[str]) -> _Parameter | None:
        """The element that a `<parameter=KEY>` opens, None if its value does not end."""
        close = self.end_of_value(tag)
        if close is None:
            return None
        start, end, after = tag.end(), close.start(), close.start()
        lines = self.text.startswith("\n", start) + self.text.startswith("\n", end - 1, end)
        start += self.text.startswith("\n", start, end)
        end -= self.text.startswith("\n", end - 1) and end > start
        if close[0] == "</parameter>":
            after = close.end() + self.text.startswith("\n", close.end())
        else:
            self.report("envelope", (after, after), "</parameter> is missing")
        if lines < 2 or close.start() - tag.end() < 2:
            self.report("repairable", tag.span(), f"the value of {tag[1]!r} does not stand on lines of its own")
        return _Parameter(tag[1], tag.span(1), (start, end), (tag.start(), after))

    def fill(self, call: ParsedCall, elements: list[_Parameter], span: Span) -> None:
        """Put the parameters into the call; of those with the same key the last one counts."""
        schema = parameters_of(self.tools, call.name)
        last = {element.key: element for element in elements}
        seen: set[str] = set()
        call.arguments = {}
        call.fields[""] = Field(None, span, call.arguments)
        for element in elements:
            start, end = element.value_span
            read = typed_value(self.text[start:end], schema, element.key)
            assert read.root is not None
            if read.loose:
                loose = (start + read.loose[0][0], start + read.loose[0][1])
                self.report("repairable", loose, "Python's quotes or words instead of JSON's")
            name = pointer([element.key])
            value_span = (start + read.root.span[0], start + read.root.span[1])
            field = Field(element.key_span, value_span, read.root.value, element.span)
            if element.key in seen:
                call.duplicates.append((name, field))
            seen.add(element.key)
            call.arguments.setdefault(element.key, None)
            if element is last[element.key]:
                call.arguments[element.key] = read.root.value
                call.fields[name] = field
                read_fields(call, read.root, [element.key], start.__add__)

    def breaks(self, call: ParsedCall, at: int, message: str) -> int:
        """Give up on a call at a position; return where the next tag that opens or closes a call stands."""
        call.complete = False
        outer = self.first(self.outer, at)
        end = outer.start() if outer else len(self.text)
        self.report("unparseable", (at, end), message)
        return end

    def report(self, kind: str, span: Span, message: str) -> None:
        self.turn.errors.append(FormatError(f"format.{kind}", len(self.turn.calls) - 1, span, message))

    def end_of_value(self, tag: re.Match[str]) -> re.Match[str] | None:
        """The tag that ends the value behind a `<parameter=KEY>`: the next that starts a line, or for a value that does
        not start on a line of its own a `</parameter>` directly before another tag, whichever comes first."""
        line, inline = self.first(self.on_line, tag.end()), self.first(self.inline, tag.end())
        if line is None or inline is None or not self.text.startswith("\n", tag.end()):
            return min((found for found in (line, inline) if found), key=lambda found: found.start(), default=None)
        before = self.tags[bisect_left(self.starts, line.start()) - 1]
        missed = line[0] != "</parameter>" and before[0] == "</parameter>" and self.tag_behind(before.end()) is line
        return before if missed else line

    def stands_last(self, position: int) -> bool:
        """Whether a tag or the end of the text follows."""
        return self.skip_space(position) == len(self.text) or self.tag_behind(position) is not None

    def tag_behind(self, position: int) -> re.Match[str] | None:
        """The tag that stands at a position or behind white space there."""
        found, at = bisect_left(self.starts, position), self.skip_space(position)
        return self.tags[found] if found < len(self.tags) and self.starts[found] == at else None

    def first(self, indexes: list[int], position: int) -> re.Match[str] | None:
        """The first of the tags with these indexes that starts at a position or later."""
        found = bisect_left(indexes, bisect_left(self.starts, position))
        return self.tags[indexes[found]] if found < len(indexes) else None

    def skip_space(self, position: int) -> int:
        return _SPACE.match(self.text, position).end()  # type: ignore[union-attr]  # matches the empty text


QWEN3_CODER = Dialect("qwen3_coder", parse, marks=(OPEN, CLOSE))
