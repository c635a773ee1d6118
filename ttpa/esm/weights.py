"""One weight per token of a pair: more on the wrong decision and on what should stand there, less behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ttpa.errors import InputError
from ttpa.esm.places import member_span, name_place
from ttpa.esm.strict import match
from ttpa.tools.call import Call
from ttpa.tools.completion import read_completion
from ttpa.tools.json_scan import Span
from ttpa.tools.prefix import shared_length
from ttpa.tools.schema import functions
from ttpa.tools.tokens import tokens_of
from ttpa.tools.turn import ParsedCall, ParsedTurn
from ttpa.trees.record import Pair, PreferenceTree

MOST_KEY_WEIGHT = 9.0
Side = tuple[ParsedTurn, list[Span]]


@dataclass(frozen=True)
class WeightOptions:
    """Weights behind the fork of a pair: `error` for the wrong decision and for the tokens that should stand in its
    place, `follow` for all others. Both 1 is plain DPO. Raises InputError unless both are finite and not negative."""

    error: float = 1.0
    follow: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("error", self.error), ("follow", self.follow)):
            if not math.isfinite(value) or value < 0:
                raise InputError(f"the weight {name!r} must be a finite number of at least 0, not {value}")


def pair_weights(
    tree: PreferenceTree, pair: Pair, tokenizer: Any, options: WeightOptions
) -> tuple[list[float], list[float]]:
    """Weights of the completion tokens of the chosen and of the rejected leaf of a pair.

    Tokens before the fork, the first one in which the two differ, weigh 1, so they cancel in the margin. On the
    rejected side the fork weighs `options.error`, or, where both sides say different things before they call, the first
    token of an error in a call. So do, on the chosen side, the tokens of what the errors name: the value at the same
    pointer, the parameter or the call that is missing, the tool's name. The fork stands for an error that names nothing
    there (a surplus parameter or call, broken text), and for the end of a name or value where the wrong one goes on.
    All other tokens weigh `options.follow`. If the rejected leaf has no errors on record, all weights are 1. Tokens
    that the model did not write weigh 0. Raises InputError as `read_completion` does.
    """
    chosen, rejected = tree.completion_ids(pair.chosen), tree.completion_ids(pair.rejected)
    errors = tree.leaves[pair.rejected].errors
    chosen_weights, rejected_weights = [1.0] * len(chosen), [1.0] * len(rejected)
    if errors and (options.error, options.follow) != (1.0, 1.0):
        fork = shared_length(chosen, rejected)
        # Behind its first wrong token the rejected side is often right given that token ("_event" after "create"):
        # pushing those tokens down unlearns them where they belong.
        sides = [read_completion(tokenizer, ids, tree.tools) for ids in (chosen, rejected)]
        first = _first_wrong(sides, errors, fork)
        wrong = [(first, first + 1)]
        right = list(_counterparts(sides, functions(tree.tools), errors, fork))
        for weights, ranges in ((chosen_weights, right), (rejected_weights, wrong)):
            weights[fork:] = [options.follow] * (len(weights) - fork)
            for start, end in ranges:
                for i in range(max(start, fork), min(end, len(weights))):
                    weights[i] = options.error
    return _trained(tree, pair.chosen, chosen_weights), _trained(tree, pair.rejected, rejected_weights)


def key_token_weights(tree: PreferenceTree, pair: Pair, tokenizer: Any) -> tuple[list[float], list[float]]:
    """As `pair_weights`, by TL-Training's rule for key tokens, which needs no errors.

    Key tokens are the first token of each call and every token at which the call's tool name parts from the name of
    another tool with which it has a beginning in common. Behind the fork of the pair each of k key tokens weighs
    min(o/k, 9), if that is more than 1, where o counts the completion's other tokens; all others weigh 1, and so does
    what both sides share. Source: TL-Training (arXiv 2412.15495), published code; there all tokens of a gold call have
    these weights, divided by their sum. Calls that are read without positions have no key tokens. Raises InputError as
    `read_completion` does.
    """
    sides = [tree.completion_ids(leaf) for leaf in (pair.chosen, pair.rejected)]
    fork, names = shared_length(*sides), list(functions(tree.tools))
    weights = [[1.0] * len(ids) for ids in sides]
    for ids, side in zip(sides, weights, strict=True):
        keys = _key_tokens(*read_completion(tokenizer, ids, tree.tools), names)
        weight = max(1.0, min((len(ids) - len(keys)) / len(keys), MOST_KEY_WEIGHT)) if keys else 1.0
        for i in keys:
            if i >= fork:
                side[i] = weight
    return _trained(tree, pair.chosen, weights[0]), _trained(tree, pair.rejected, weights[1])


def _trained(tree: PreferenceTree, leaf: int, weights: list[float]) -> list[float]:
    return [w * t for w, t in zip(weights, tree.trained(leaf), strict=True)]


def _key_tokens(turn: ParsedTurn, spans: Sequence[Span], names: list[str]) -> set[int]:
    places: set[int] = set()
    for call in turn.calls:
        if call.name is None or call.span is None or call.name_span is None:
            continue
        shared = (shared_length(call.name, name) for name in names if name != call.name)
        first = call.name_span[0] + (turn.text[call.name_span[0]] in "\"'")
        # a name that the other one goes on from parts from it at what stands behind it
        places |= {call.span[0]} | {first + length for length in shared if length}
    return {tokens_of((place, place + 1), spans)[0] for place in places}


def _first_wrong(sides: Sequence[Side], errors: list[dict[str, Any]], fork: int) -> int:
    """The token at which the rejected side goes wrong."""

    def place(side: Side, token: int) -> int:
        turn, spans = side
        return spans[token][0] if token < len(spans) else len(turn.text)

    def in_call(side: Side, token: int) -> bool:
        at = place(side, token)
        return any(call.span is not None and call.span[0] <= at < call.span[1] for call in side[0].calls)

    if any(in_call(side, fork) or place(side, fork) >= len(side[0].text) for side in sides):
        return fork
    starts = [error["tokens"][0] for error in errors if error["tokens"]]
    return min((start for start in starts if start >= fork and in_call(sides[1], start)), default=fork)


def _counterparts(
    sides: Sequence[Side], functions: dict[str, dict[str, Any]], errors: list[dict[str, Any]], fork: int
) -> Iterator[tuple[int, int]]:
    """Token ranges of the chosen side that stand for the errors of the rejected side."""
    (turn, spans), (rejected, _) = sides
    wanted = [Call(call.name or "", call.arguments or {}) for call in turn.calls]
    partner = dict(match(rejected, wanted, functions))
    unmatched = [call for call in turn.calls if call.index not in partner.values()]
    for error in errors:
        code, call = error["code"], turn.calls[partner[error["call"]]] if error["call"] in partner else None
        found: list[Span | None] = []
        if code in ("no_call", "call.missing"):
            found = [missing.span for missing in unmatched]
        elif call is not None and code.startswith("tool."):
            found = [name_place(call)]
        elif call is not None:
            found = [_field_span(turn, call, code, error["pointer"])]
        ranges = [tokens_of(span, spans) for span in found if span is not None]
        # what the wrong one goes on from ("3" of "30") parts from it at the token behind its end
        yield from ((start, end + (end == fork)) for start, end in ranges or [(fork, fork + 1)])


def _field_span(turn: ParsedTurn, call: ParsedCall, code: str, pointer: str) -> Span | None:
    """Where the chosen call has what the error is about: a whole parameter if it was missing, else a value."""
    if call.inner_span is None and code.startswith(("param.missing", "value.")):
        return call.span
    part = call.fields.get(pointer)
    if part is None or not code.startswith(("param.missing", "value.")):
        return None
    whole = member_span(turn.text, part) if code.startswith("param.missing") else None
    return part.value_span if whole is None else whole
