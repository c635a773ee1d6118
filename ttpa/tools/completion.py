"""A completion's token ids as a parsed turn, and which characters each token wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ttpa.tools.dialects.detect import dialect_of
from ttpa.tools.json_scan import Span
from ttpa.tools.tokens import completion_text
from ttpa.tools.turn import ParsedTurn


def read_completion(
    tokenizer: Any, ids: Sequence[int], tools: Sequence[dict[str, Any]]
) -> tuple[ParsedTurn, list[Span]]:
    """The turn that the ids of a completion write, read in the dialect of the tokenizer, and the half-open span of
    characters of each token (`completion_text`); raises InputError as `dialect_of` and `token_spans` do."""
    dialect = dialect_of(tokenizer)
    text, spans = completion_text(tokenizer, ids, marks=dialect.marks)
    return dialect.read(text, tools), spans
