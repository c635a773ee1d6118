"""What can be wrong with a tool call, how bad each kind is, and the result of scoring a turn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ttpa.tools.json_scan import Span

FATAL, MAJOR, MINOR = 1.0, 0.5, 0.1
SEVERITY = {"fatal": FATAL, "major": MAJOR, "minor": MINOR}

PENALTY: dict[str, float] = {
    "no_call": FATAL,
    "unwanted_call": FATAL,
    "format.unparseable": FATAL,
    "format.envelope": MAJOR,
    "format.repairable": MINOR,
    "call.missing": FATAL,
    "call.extra": FATAL,
    "call.repeated": FATAL,
    "tool.unknown": FATAL,
    "tool.wrong": FATAL,
    "param.missing_required": MAJOR,
    "param.missing_expected": MINOR,
    "param.unknown": MAJOR,
    "param.unexpected": MINOR,
    "param.duplicate": MINOR,
    "value.type": MAJOR,
    "value.constraint": MAJOR,
    "value.wrong": MAJOR,
    "value.near": MINOR,
}
"""Every error code and the share of a call's score that it takes: fatal all of it, major half, minor a tenth.

This is the table of the preset `strict`; one of a user's own is read by `presets.read_penalties`.
"""


def share(codes: Iterable[str], penalty: Mapping[str, float]) -> float:
    """What errors of these codes leave of a score of 1: prod (1 - penalty)."""
    return math.prod(1.0 - penalty[code] for code in codes)


@dataclass(frozen=True)
class Error:
    """One error of a turn, and where it is.

    `call` is the index of the call in the output (in the gold calls for no_call and call.missing; -1 for a closing tag
    before the first call). `pointer` is a JSON pointer into the arguments of that call. `expected` and `got` are the
    values, names or schema keywords that disagree. `span` is a half-open range of characters of the text that was
    scored, `tokens` one of its completion tokens; None where no text or no token ids were given. `error_type` is the
    name that BFCL has for the error, None but for the preset `bfcl`.
    """

    code: str
    call: int
    pointer: str = ""
    expected: Any = None
    got: Any = None
    span: Span | None = None
    tokens: tuple[int, int] | None = None
    error_type: str | None = None

    def to_leaf(self) -> dict[str, Any]:
        """The record that a tree's leaf keeps of an error."""
        return {
            "code": self.code,
            "call": self.call,
            "pointer": self.pointer,
            "tokens": None if self.tokens is None else list(self.tokens),
        }


@dataclass(frozen=True)
class Score:
    """The score of a turn, whether it is free of errors, and all errors found.

    The score lies in [0, 1], but for `toolrl` in [-3, 3] and for `tl_training` in [-2, 1].
    """

    score: float
    valid: bool
    errors: list[Error]
