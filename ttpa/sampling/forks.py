"""Where a trunk is forked: uncertain tokens inside a call, those first that decide the most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ttpa.sampling.decode import Decoded
from ttpa.sampling.options import SamplingOptions
from ttpa.tools.hermes import CLOSE, OPEN, ParsedCall, parse
from ttpa.tools.json_scan import Span
from ttpa.tools.schema import functions, schema_at
from ttpa.tools.tokens import completion_text

FORCED = 0.995
"""A token of this probability or more is no choice."""

FIELD_WEIGHT = {"name": 3.0, "key": 2.5, "value": 2.0, "bracket": 1.5, "string": 1.0, "other": 0.5}
"""How much a nat of entropy counts by field class; `value` is a number, a word (true, null) or one of an enum."""


@dataclass(frozen=True)
class Place:
    """A position of a trunk at which other tokens are tried: its field class, its score, and the other tokens with
    their probabilities, the most likely first."""

    at: int
    field: str
    score: float
    alternatives: list[tuple[int, float]]


def fork_places(
    decoded: Decoded, fields: Sequence[str | None], *, options: SamplingOptions, forced: float = FORCED
) -> list[Place]:
    """The places at which a trunk is forked, in order of position; `fields` is the class of each of its tokens.

    A candidate lies in a field, has a token of probability p1 < `forced` and another of probability p2, and meets
    H >= min_entropy, p2 >= min_probability and p2 / p1 >= min_ratio. Its score is H x FIELD_WEIGHT. The `num_forks`
    best are taken, those at equal score from the left, each at least `min_distance` tokens from a better one. The
    rule is our own.
    """
    candidates = []
    for at, (token, entropy, field) in enumerate(zip(decoded.ids, decoded.entropy, fields, strict=True)):
        if field is None or entropy < options.min_entropy:
            continue
        likely = list(zip(decoded.top_ids[at].tolist(), decoded.top_probabilities[at].tolist(), strict=True))
        p1 = next((p for other, p in likely if other == token), 0.0)
        others = [(other, p) for other, p in likely if other != token and p >= options.min_probability]
        if p1 < forced and others and others[0][1] >= options.min_ratio * p1:
            candidates.append(Place(at, field, entropy * FIELD_WEIGHT[field], others[: options.alternatives]))
    taken: list[Place] = []
    for place in sorted(candidates, key=lambda place: (-place.score, place.at)):
        if len(taken) < options.num_forks and all(abs(place.at - t.at) >= options.min_distance for t in taken):
            taken.append(place)
    return sorted(taken, key=lambda place: place.at)


def token_fields(tokenizer: Any, ids: Sequence[int], tools: Sequence[dict[str, Any]]) -> list[str | None]:
    """The field class of each token of a completion, None for tokens outside of calls and for the tags of calls.

    Classes are the keys of FIELD_WEIGHT; a token that touches several has the heaviest. In a call that could not be
    read to its end, what was not read is `other`.
    """
    text, spans = completion_text(tokenizer, ids)
    of_character: list[str | None] = [None] * (len(text) + 1)
    schemas = functions(tools)
    for call in parse(text).calls:
        _mark_call(of_character, text, call, schemas.get(call.name or "", {}).get("parameters", {}))
    fields: list[str | None] = []
    for start, end in spans:
        found = {field for field in of_character[start : max(end, start + 1)] if field is not None}
        fields.append(max(found, key=FIELD_WEIGHT.__getitem__) if found else None)
    return fields


def _mark_call(of_character: list[str | None], text: str, call: ParsedCall, parameters: dict[str, Any]) -> None:
    def mark(field: str, span: Span) -> None:
        of_character[span[0] : span[1]] = [field] * (span[1] - span[0])

    assert call.span is not None  # the call was read from text
    start, end = call.span
    start += len(OPEN) * text.startswith(OPEN, start)
    end -= len(CLOSE) * text[start:end].endswith(CLOSE)
    mark("bracket" if call.complete else "other", (start, end))
    if call.name_span is not None:
        mark("name", call.name_span)
    for pointer, field in call.fields.items():
        if field.key_span is not None:
            mark("key", field.key_span)
        if isinstance(field.value, dict | list):
            if not call.complete:
                mark("bracket", field.value_span)
            continue
        listed = "enum" in schema_at(parameters, _path(pointer, call.arguments))
        mark("string" if isinstance(field.value, str) and not listed else "value", field.value_span)


def _path(pointer: str, arguments: Any) -> list[str | int]:
    """The parts of a JSON pointer into the arguments, indexes of lists as numbers."""
    path: list[str | int] = []
    for part in pointer.split("/")[1:]:
        key: str | int = part.replace("~1", "/").replace("~0", "~")
        if isinstance(arguments, list):
            key = int(key)
        arguments = arguments[key]
        path.append(key)
    return path
