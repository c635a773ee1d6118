"""What a dialect is: one way in which models write tool calls into their turns."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ttpa.tools.turn import ParsedTurn

REASONING = {"<think>": "</think>", "[THINK]": "[/THINK]"}
_OPEN = re.compile(r"\s*(<think>|\[THINK\])")


@dataclass(frozen=True)
class Dialect:
    """A dialect by name. `parse(text, tools)` reads a turn without its end-of-turn token and never raises; `tools` are
    OpenAI function schemas, which only dialects with untyped values need. `marks` are the texts that open and close
    calls: a special token among them belongs to the turn even where it is its last token."""

    name: str
    parse: Callable[[str, Sequence[dict[str, Any]]], ParsedTurn]
    marks: tuple[str, ...] = ()

    def read(self, text: str, tools: Sequence[dict[str, Any]] = ()) -> ParsedTurn:
        """As `parse`, but what a model writes while it reasons makes no call: everything up to the tag that ends the
        reasoning, whether the turn or the prompt before it opened it, and all of a turn that was cut off before."""
        opened = _OPEN.match(text)
        if opened:
            end = text.find(REASONING[opened[1]], opened.end())
            end = len(text) if end < 0 else end + len(REASONING[opened[1]])
        else:
            end = max((at + len(close) for close in REASONING.values() if (at := text.find(close)) >= 0), default=0)
        turn = self.parse(text, tools) if not opened else None
        if turn is not None and (not end or any(_holds(call.span, end) for call in turn.calls if call.complete)):
            return turn
        turn = self.parse(" " * end + text[end:], tools)
        return replace(turn, text=text, content="\n\n".join(filter(None, (text[:end].strip(), turn.content))))


def _holds(span: tuple[int, int] | None, position: int) -> bool:
    return span is not None and span[0] < position < span[1]
