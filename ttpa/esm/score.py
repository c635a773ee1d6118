"""Scoring a model's turn against the gold calls, from text, from records or from token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ttpa.errors import InputError
from ttpa.esm.bfcl import bfcl
from ttpa.esm.errors import Score
from ttpa.esm.presets import FORMULAS, NAMES, read_penalties
from ttpa.esm.strict import strict
from ttpa.tools.call import Call, call_from_message
from ttpa.tools.completion import read_completion
from ttpa.tools.dialects import dialect_named
from ttpa.tools.schema import functions
from ttpa.tools.tokens import tokens_of
from ttpa.tools.turn import ParsedCall, ParsedTurn

Calls = Sequence[Call | dict[str, Any]]


def score_call(
    output: str | Calls,
    gold: Calls,
    tools: Sequence[dict[str, Any]],
    *,
    preset: str | Path = "strict",
    dialect: str = "hermes",
) -> Score:
    """Score what a model wrote against the calls it should have made, and list its errors.

    `output` is the text of a turn without its end-of-turn token, its calls written as `dialect` does (a name out of
    `ttpa.tools.dialects.DIALECTS`; "hermes" has `<tool_call>` tags), or a list of calls, `gold` a list of calls; a call
    is a `Call` or a record `{"name", "arguments"}`. `tools` are OpenAI function schemas. `preset` is "strict",
    "release", "toolrl", "tl_training" or "binary" (the formulas are in `strict.strict`, in `release.release` and in
    `rewards`), the path of a YAML file with penalties for `strict` (`presets.read_penalties`), or "bfcl" (`bfcl.bfcl`),
    for which `gold` is BFCL's list of alternatives and `tools` may be BFCL's. The score lies in [0, 1], for "toolrl" in
    [-3, 3], for "tl_training" in [-2, 1]; errors carry spans of characters if `output` is text. Raises InputError for
    presets, dialects, tools and records that are no such thing.
    """
    if isinstance(output, str):
        return _score_turn(dialect_named(dialect).read(output, tools), gold, tools, preset)
    score = _score_turn(_as_turn(_calls(output)), gold, tools, preset)
    return replace(score, errors=[replace(error, span=None) for error in score.errors])


def score_tokens(
    tokenizer: Any, ids: Sequence[int], gold: Calls, tools: Sequence[dict[str, Any]], *, preset: str | Path = "strict"
) -> Score:
    """As `score_call` for the token ids of a completion; the errors also carry half-open ranges of these tokens.

    The dialect is that of the tokenizer (`ttpa.tools.dialects.detect.dialect_of`). The ids may end with the end-of-turn
    token: it is the place of a call that is missing. Where the completion was cut off, an error at its end has an empty
    range. Raises InputError as `read_completion` does.
    """
    turn, spans = read_completion(tokenizer, ids, tools)
    score = _score_turn(turn, gold, tools, preset)
    located = [replace(e, tokens=tokens_of(e.span, spans)) if e.span is not None else e for e in score.errors]
    return replace(score, errors=located)


def _score_turn(turn: ParsedTurn, gold: Calls, tools: Sequence[dict[str, Any]], preset: str | Path) -> Score:
    try:
        return _scorer(str(preset))(turn, gold, tools)
    except RecursionError:
        raise InputError("the arguments of a call or a schema are nested too deeply") from None


def _scorer(preset: str) -> Callable[[ParsedTurn, Calls, Sequence[dict[str, Any]]], Score]:
    if preset == "bfcl":
        return bfcl
    if preset in FORMULAS:
        formula = FORMULAS[preset]
        return lambda turn, gold, tools: formula(turn, _calls(gold), functions(tools))
    if not preset.endswith((".yaml", ".yml")):
        raise InputError(f"unknown preset {preset!r}; the presets are {', '.join(NAMES)}, or the path of a YAML file")
    penalty = read_penalties(preset)
    return lambda turn, gold, tools: strict(turn, _calls(gold), functions(tools), penalty)


def _calls(records: Calls) -> list[Call]:
    if not isinstance(records, list | tuple):
        raise InputError(
            f"calls must come as a list of Call or of records with name and arguments, not {records!r:.80}"
        )
    return [record if isinstance(record, Call) else call_from_message(record) for record in records]


def _as_turn(calls: list[Call]) -> ParsedTurn:
    return ParsedTurn("", [ParsedCall(i, call.name, call.arguments) for i, call in enumerate(calls)], [], "")
