"""Scoring a model's turn against the gold calls, from text, from records or from token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ttpa.errors import InputError
from ttpa.esm.errors import Score
from ttpa.esm.release import release
from ttpa.esm.strict import strict
from ttpa.tools.call import Call, call_from_message
from ttpa.tools.hermes import ParsedCall, ParsedTurn, parse
from ttpa.tools.schema import functions
from ttpa.tools.tokens import completion_text, tokens_of

Calls = Sequence[Call | dict[str, Any]]
_PRESETS = {"strict": strict, "release": release}


def score_call(output: str | Calls, gold: Calls, tools: Sequence[dict[str, Any]], *, preset: str = "strict") -> Score:
    """Score what a model wrote against the calls it should have made, and list its errors.

    `output` is the text of a turn without its end-of-turn token (calls in `<tool_call>` tags) or a list of calls,
    `gold` a list of calls; a call is a `Call` or a record `{"name", "arguments"}`. `tools` are OpenAI function schemas.
    `preset` is "strict" (see `strict.strict` for the formula) or "release" (see `release.release`). The score lies in
    [0, 1]; errors carry spans of characters if `output` is text. Raises InputError for tools and records that are no
    such thing.
    """
    if preset not in _PRESETS:
        raise InputError(f"unknown preset {preset!r}; the presets are {', '.join(_PRESETS)}")
    if isinstance(output, str):
        return _PRESETS[preset](parse(output), _calls(gold), functions(tools))
    score = _PRESETS[preset](_as_turn(_calls(output)), _calls(gold), functions(tools))
    return replace(score, errors=[replace(error, span=None) for error in score.errors])


def score_tokens(
    tokenizer: Any, ids: Sequence[int], gold: Calls, tools: Sequence[dict[str, Any]], *, preset: str = "strict"
) -> Score:
    """As `score_call` for the token ids of a completion; the errors also carry half-open ranges of these tokens.

    The ids may end with the end-of-turn token: it is the place of a call that is missing. Where the completion was cut
    off, an error at its end has an empty range. Raises InputError for a tokenizer that `token_spans` cannot read.
    """
    text, spans = completion_text(tokenizer, ids)
    score = score_call(text, gold, tools, preset=preset)
    located = [replace(e, tokens=tokens_of(e.span, spans)) if e.span is not None else e for e in score.errors]
    return replace(score, errors=located)


def _calls(records: Calls) -> list[Call]:
    return [record if isinstance(record, Call) else call_from_message(record) for record in records]


def _as_turn(calls: list[Call]) -> ParsedTurn:
    return ParsedTurn("", [ParsedCall(i, call.name, call.arguments) for i, call in enumerate(calls)], [], "")
