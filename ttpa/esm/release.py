"""The preset `release`: the scoring function in the code that the authors of TTPA published, with its quirks."""

from __future__ import annotations

from typing import Any

from ttpa.esm.errors import Score
from ttpa.esm.strict import strict
from ttpa.tools.call import Call
from ttpa.tools.turn import ParsedTurn

_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def release(turn: ParsedTurn, gold: list[Call], functions: dict[str, dict[str, Any]]) -> Score:
    """Score the first call of a turn against the first gold call by the published formula.

    With the call (p, P), the gold call (g, G), the schema of p (properties Props, required Req) and D = max(|P|, |G|):
    score = (3*[p = g] + 3*|{r in Req: r in G}|/|Req| + |{a in P: a in Props}|/D + 2*|{a in P: type fits}|/D
    + 2*sum_{a in P and G} v(P[a], G[a])/D) / 11, where v is 1 for equal values and, for two texts, half for equality
    but for case plus half for one containing the other. Same name and no arguments on both sides: 1; otherwise no
    arguments or no call: 0. Quirks kept: required names are looked for in the gold arguments, bools pass as integers,
    later calls are not looked at. One difference: a tool without a schema scores 0 in its schema parts; the published
    code crashes. Without gold calls, a case that the published code does not have, the score is 1 if there is no call
    and else 0. Source: TTPA (arXiv 2505.20016), published code, `Components/sampling.py`. `errors` and `valid` are
    those of `strict`.
    """
    found = strict(turn, gold, functions)
    if not gold:
        return Score(float(not turn.calls), found.valid, found.errors)
    call = first_call(turn)
    return Score(0.0 if call is None else _formula(call, gold[0], functions), found.valid, found.errors)


def first_call(turn: ParsedTurn) -> Call | None:
    """The first call of a turn, None if there is none or it cannot be read."""
    unreadable = any(e.call == 0 and e.code == "format.unparseable" for e in turn.errors)
    if not turn.calls or unreadable or turn.calls[0].name is None or turn.calls[0].arguments is None:
        return None
    return Call(turn.calls[0].name, turn.calls[0].arguments)


def _formula(call: Call, gold: Call, functions: dict[str, dict[str, Any]]) -> float:
    given, wanted = call.arguments, gold.arguments
    if not given:
        return float(call.name == gold.name and not wanted)
    longer = max(len(given), len(wanted))
    name = float(call.name == gold.name)
    required = key = kind = 0.0
    if call.name in functions:
        parameters = functions[call.name]["parameters"]
        properties, names = parameters["properties"], parameters.get("required", [])
        required = sum(r in wanted for r in names) / len(names) if names else 1.0
        key = sum(a in properties for a in given) / longer
        kind = sum(a in properties and _type_fits(given[a], properties[a]) for a in given) / longer
    value = sum(_likeness(given[a], wanted[a]) for a in given if a in wanted) / longer
    return (3 * name + 3 * required + key + 2 * kind + 2 * value) / 11


def _type_fits(value: Any, schema: Any) -> bool:
    kinds = schema.get("type") if isinstance(schema, dict) else None
    return any(isinstance(value, _TYPES[kind]) for kind in ([kinds] if isinstance(kinds, str) else kinds or []))


def _likeness(given: Any, wanted: Any) -> float:
    if given == wanted:
        return 1.0
    if not isinstance(given, str) or not isinstance(wanted, str):
        return 0.0
    return 0.5 * (given.lower() == wanted.lower()) + 0.5 * (given in wanted or wanted in given)
