"""Where a path is forked: uncertain tokens inside a call, those first that decide the most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ttpa.sampling.decoded import Decoded
from ttpa.sampling.options import SamplingOptions
from ttpa.sampling.rules import RULES, alternatives
from ttpa.tools.completion import read_completion
from ttpa.tools.fields import character_fields

FIELD_WEIGHT = {"name": 3.0, "key": 2.5, "value": 2.0, "bracket": 1.5, "string": 1.0, "other": 0.5}
"""How much a score counts by field class (those of `character_fields`, tags left out)."""


@dataclass(frozen=True)
class Place:
    """A position of a path at which other tokens are tried: its field class, its score, and the other tokens with
    their probabilities, the most likely first."""

    at: int
    field: str
    score: float
    alternatives: list[tuple[int, float]]


def is_candidate(decoded: Decoded, at: int, *, options: SamplingOptions) -> list[tuple[int, float]]:
    """The other tokens to try at one position with their probabilities, the likeliest first; empty where the floors
    are not met (`ttpa.sampling.rules.alternatives`) or the rule's score is negative. Depends on nothing behind the
    position, so it can be asked while the path is being written; whether the position lies in a call is not asked."""
    others = alternatives(decoded, at, options=options)
    return others if others and RULES[options.rule](decoded, at) >= 0 else []


def fork_places(
    decoded: Decoded,
    fields: Sequence[str | None],
    *,
    options: SamplingOptions,
    first: int = 0,
    limit: int | None = None,
) -> list[Place]:
    """The places from position `first` on at which a path is forked, in order of position; `fields` is the class of
    each of its tokens. Candidates (`is_candidate`) that lie in a field score rule x FIELD_WEIGHT. Under fork_order best
    the `limit` best are taken (None: `options.num_forks`), those at equal score from the left; under first the
    earliest. Each is at least `min_distance` tokens from those taken before it. The weights are our own."""
    candidates = []
    for at in range(first, len(decoded.ids)):
        field = fields[at]
        others = [] if field is None else is_candidate(decoded, at, options=options)
        if field is not None and others:
            candidates.append(Place(at, field, RULES[options.rule](decoded, at) * FIELD_WEIGHT[field], others))
    if options.fork_order == "best":
        candidates.sort(key=lambda place: -place.score)
    limit = options.num_forks if limit is None else limit
    taken: list[Place] = []
    for place in candidates:
        if len(taken) < limit and all(abs(place.at - t.at) >= options.min_distance for t in taken):
            taken.append(place)
    return sorted(taken, key=lambda place: place.at)


def token_fields(tokenizer: Any, ids: Sequence[int], tools: Sequence[dict[str, Any]]) -> list[str | None]:
    """The field class of each token of a completion, None for tokens outside of calls and for the tags of calls.

    Classes are the keys of FIELD_WEIGHT; a token that touches several has the heaviest. In a call that could not be
    read to its end, what was not read is `other`.
    """
    turn, spans = read_completion(tokenizer, ids, tools)
    of_character = character_fields(turn, tools)
    fields: list[str | None] = []
    for start, end in spans:
        found = set(of_character[start : max(end, start + 1)])
        fields.append(max((f for f in FIELD_WEIGHT if f in found), key=FIELD_WEIGHT.__getitem__, default=None))
    return fields
