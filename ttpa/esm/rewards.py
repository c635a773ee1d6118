"""The presets `toolrl`, `tl_training` and `binary`: rewards that others published."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from ttpa.esm.errors import Score
from ttpa.esm.release import first_call
from ttpa.esm.strict import strict
from ttpa.tools.call import Call, normal_json
from ttpa.tools.turn import ParsedTurn

_LADDER = {  # invented, redundant, missing parameters
    (True, True, True): -1.8,
    (True, True, False): -1.3,
    (True, False, True): -1.3,
    (False, True, True): -1.0,
    (True, False, False): -0.8,
    (False, True, False): -0.5,
    (False, False, True): -0.5,
}


def toolrl(turn: ParsedTurn, gold: list[Call], functions: dict[str, dict[str, Any]]) -> Score:
    """The correctness reward of ToolRL, in [-3, 3]: 6 * S / Smax - 3.

    S = J(names of the calls, of gold) + sum over gold calls (g, G), each with the unused call (g, P) that gives most,
    of J(keys of P, of G) + #{a in G: P[a] = G[a]}, where J is Jaccard's index of multisets; Smax = 1 + sum(1 + |G|).
    Text without a readable call or with a format error scores -3. Without gold calls the score is 0, as published. The
    published format reward in {0, 1} for the tags of its prompt is not added. `errors` and `valid` are those of
    `strict`. Source: ToolRL (arXiv 2504.13958), published code.
    """
    found = strict(turn, gold, functions)
    if not gold:
        return Score(0.0, found.valid, found.errors)
    calls = _calls(turn)
    if not calls:
        return Score(-3.0, found.valid, found.errors)
    total = _jaccard([call.name for call in calls], [wanted.name for wanted in gold])
    unused = dict(enumerate(calls))
    for wanted in gold:
        gain = {i: _likeness(call, wanted) for i, call in unused.items() if call.name == wanted.name}
        best = max(gain, key=gain.__getitem__, default=None)
        if best is not None and gain[best] > 0.0:
            total += gain[best]
            del unused[best]
    most = 1 + sum(1 + len(wanted.arguments) for wanted in gold)
    return Score(6.0 * total / most - 3.0, found.valid, found.errors)


def tl_training(turn: ParsedTurn, gold: list[Call], functions: dict[str, dict[str, Any]]) -> Score:
    """The reward of TL-Training for the first call, in [-2, 1]: the first line of its ladder that holds.

    No readable call or an unknown tool -2; another tool than gold's -1.5; invented (not in the schema), redundant (not
    in gold) and missing parameters together -1.8; invented and one of the others -1.3; redundant and missing -1;
    invented -0.8; redundant or missing -0.5; a wrong value -0.25; else 1. Without gold calls 1 if there is no call, and
    a call of a known tool is one of another tool. Unlike the published code, which reads texts in single quotes only,
    all values are compared. `errors` and `valid` are those of `strict`. Source: TL-Training (arXiv 2412.15495),
    published code, `ppo_trainer.py`.
    """
    found = strict(turn, gold, functions)
    return Score(_ladder(turn, gold, functions), found.valid, found.errors)


def binary(turn: ParsedTurn, gold: list[Call], functions: dict[str, dict[str, Any]]) -> Score:
    """The reward of Tool-N1: 1 if the calls are those of gold, in any order, in text without a format error, else 0.

    Calls are equal if their names and the JSON texts of their arguments with sorted keys are, so 3.0 is not 3. The
    `<think>` element that the published reward also asks for is left to the prompt and not looked at. `errors` and
    `valid` are those of `strict`. Source: Tool-N1 (arXiv 2505.00024), published code.
    """
    found = strict(turn, gold, functions)
    right = Counter(map(_text, _calls(turn))) == Counter(map(_text, gold)) and not turn.errors
    return Score(float(right), found.valid, found.errors)


def _calls(turn: ParsedTurn) -> list[Call]:
    """The calls of a turn whose text has no format error; else none."""
    return [] if turn.errors else [Call(call.name or "", call.arguments or {}) for call in turn.calls]


def _jaccard(one: list[str], other: list[str]) -> float:
    common = sum((Counter(one) & Counter(other)).values())
    return common / (len(one) + len(other) - common) if one or other else 1.0


def _likeness(call: Call, wanted: Call) -> float:
    equal = sum(key in call.arguments and call.arguments[key] == value for key, value in wanted.arguments.items())
    return _jaccard(list(call.arguments), list(wanted.arguments)) + equal


def _ladder(turn: ParsedTurn, gold: list[Call], functions: dict[str, dict[str, Any]]) -> float:
    if not gold and not turn.calls:
        return 1.0
    call = first_call(turn)
    if call is None or call.name not in functions:
        return -2.0
    if not gold or call.name != gold[0].name:
        return -1.5
    given, wanted = call.arguments, gold[0].arguments
    properties = functions[call.name]["parameters"]["properties"]
    invented = any(key not in properties for key in given)
    redundant = any(key in properties and key not in wanted for key in given)
    missing = any(key not in given for key in wanted)
    if (invented, redundant, missing) in _LADDER:
        return _LADDER[invented, redundant, missing]
    return 1.0 if normal_json(given) == normal_json(wanted) else -0.25


def _text(call: Call) -> tuple[str, str]:
    return call.name, json.dumps(call.arguments, sort_keys=True)
