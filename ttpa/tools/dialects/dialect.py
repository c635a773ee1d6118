"""What a dialect is: one way in which models write tool calls into their turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ttpa.tools.turn import ParsedTurn


@dataclass(frozen=True)
class Dialect:
    """A dialect by name. `parse(text, tools)` reads a turn without its end-of-turn token and never raises; `tools` are
    OpenAI function schemas, which only dialects with untyped values need. `marks` are the texts that open and close
    calls: a special token among them belongs to the turn even where it is its last token."""

    name: str
    parse: Callable[[str, Sequence[dict[str, Any]]], ParsedTurn]
    marks: tuple[str, ...] = ()
