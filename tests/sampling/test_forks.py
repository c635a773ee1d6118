"""Where a path is forked."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
from decoded_paths import decoded
from hesitant import TOOLS

from ttpa.sampling.forks import fork_places, is_candidate, token_fields
from ttpa.sampling.options import SamplingOptions
from ttpa.sampling.rules import RULES
from ttpa.tools.dialects.hermes import parse

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2, "unit": "C"}}\n</tool_call>'
EVEN = (1.0, [(5, 0.5), (6, 0.25), (7, 0.125), (8, 0.0078125)])
PROBABILITIES = [0.5, 0.8, 0.45, 0.6, 0.85, 0.475, 0.7, 0.5, 0.46, 0.88]


def fields_of(tokenizer, text, tools=TOOLS):
    """The text, and for each character the class of its token; the tokenizer writes one byte a token, tags apart."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    fields = token_fields(tokenizer, ids, tools)
    pieces = [tokenizer.decode([i]) for i in ids]
    assert "".join(pieces) == text and len(fields) == len(ids)
    return list(zip(pieces, fields, strict=True))


def runs(pairs):
    joined = []
    for piece, field in pairs:
        if joined and joined[-1][1] == field:
            joined[-1][0] += piece
        else:
            joined.append([piece, field])
    return [tuple(run) for run in joined]


def test_every_part_of_a_call_has_its_class(tokenizer):
    assert runs(fields_of(tokenizer, "Well: " + CALL + " done")) == [
        ("Well: <tool_call>", None),
        ('\n{"name": ', "bracket"),
        ('"weather"', "name"),
        (', "arguments": {', "bracket"),
        ('"city"', "key"),
        (": ", "bracket"),
        ('"Rome"', "string"),
        (", ", "bracket"),
        ('"days"', "key"),
        (": ", "bracket"),
        ("2", "value"),
        (", ", "bracket"),
        ('"unit"', "key"),
        (": ", "bracket"),
        ('"C"', "value"),
        ("}}\n", "bracket"),
        ("</tool_call> done", None),
    ]


def test_nested_values_have_their_schema(tokenizer):
    item = {"type": "object", "properties": {"a/b": {"enum": ["x", "y"]}, "c": {"type": "string"}}}
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"l": {"type": "array", "items": item}}}}
    call = {"name": "f", "arguments": {"l": [{"a/b": "x", "c": "x"}]}}
    found = fields_of(tokenizer, f"<tool_call>\n{json.dumps(call)}\n</tool_call>", [tool])
    assert [run for run in runs(found) if run[0] == '"x"'] == [('"x"', "value"), ('"x"', "string")]


def test_what_cannot_be_read_is_other(tokenizer):
    found = runs(fields_of(tokenizer, '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", oops'))
    assert ('"weather"', "name") in found and ('"Rome"', "string") in found
    assert found[-1][1] == "other" and found[-1][0].endswith("oops")


def test_the_end_of_turn_token_and_plain_text_are_in_no_field(tokenizer):
    ids = tokenizer("no call", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert token_fields(tokenizer, ids, TOOLS) == [None] * len(ids)
    ids = tokenizer(CALL, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert token_fields(tokenizer, ids, TOOLS)[-2:] == [None, None]


def test_a_token_over_several_classes_has_the_heaviest(monkeypatch):
    text = '<tool_call>{"name": "f", "arguments": {"k": "v"}}</tool_call>'
    cuts = [0, 11, text.index('f"'), text.index("arguments"), text.index(': "v'), len(text) - 12, len(text)]
    spans = list(pairwise(cuts))
    monkeypatch.setattr("ttpa.sampling.forks.read_completion", lambda tokenizer, ids, tools: (parse(text), spans))
    fields = token_fields(None, range(len(spans)), [{"name": "f"}])
    assert fields == [None, "name", "name", "key", "bracket", None], "the last but one is a bracket and a string"


def places(path, fields, first=0, limit=None, **options):
    return fork_places(path, fields, options=SamplingOptions(**options), first=first, limit=limit)


def test_a_place_has_the_rule_times_the_weight_of_its_class():
    (place,) = places(decoded(EVEN), ["string"])
    assert (place.at, place.field, place.score) == (0, "string", 1.0)
    assert place.alternatives == [(6, 0.25), (7, 0.125)]
    (place,) = places(decoded(EVEN), ["name"], rule="surprise")
    assert place.score == pytest.approx(3 * math.log(2))


def test_tokens_outside_of_calls_and_below_the_floors_are_no_places():
    assert places(decoded(EVEN), [None]) == []
    assert places(decoded((0.05, EVEN[1])), ["name"]) == []


def test_the_best_by_score_and_class_are_taken():
    path = decoded((1.0, EVEN[1]), (0.9, EVEN[1]), (2.0, EVEN[1]), (0.2, EVEN[1]))
    fields = ["string", "value", "other", "name"]  # scores 1.0, 1.8, 1.0, 0.6
    assert [p.at for p in places(path, fields, num_forks=2)] == [0, 1]
    assert [p.at for p in places(path, fields, num_forks=3)] == [0, 1, 2]
    assert [p.at for p in places(path, fields, min_distance=2)] == [1, 3]
    assert [p.at for p in places(path, fields, num_forks=0)] == []


def test_the_rule_decides_which_places_are_best():
    even, uneven = [(5, 0.5), (6, 0.25)], [(5, 0.75), (6, 0.0625)]
    path = decoded((1.0, even), (0.5, even), (1.2, uneven), (0.5, even), varentropy=[0.1, 0.4, 0.2, 0.3])
    fields = ["string"] * 4
    best = {rule: [p.at for p in places(path, fields, num_forks=1, rule=rule)] for rule in RULES}
    assert best == {"entropy": [2], "gap": [], "surprise": [0], "change": [0], "varentropy": [1]}
    close = decoded((1.0, [(5, 0.375), (6, 0.28125)]), (1.0, [(5, 0.375), (6, 0.3125)]))
    assert [p.at for p in places(close, fields[:2], num_forks=1, rule="gap")] == [1]


def test_first_takes_the_earliest_candidates_whatever_their_score():
    path = decoded((0.05, EVEN[1]), (0.9, EVEN[1]), (2.0, EVEN[1]), (1.0, EVEN[1]), (1.0, EVEN[1]))
    fields = ["name", "other", None, "string", "name"]
    assert [p.at for p in places(path, fields, fork_order="first", num_forks=2)] == [1, 3]
    assert [p.at for p in places(path, fields, fork_order="first", min_distance=3)] == [1, 4]
    assert [p.at for p in places(path, fields, fork_order="best", num_forks=2)] == [3, 4]


def test_places_lie_behind_the_first_position_and_within_the_limit():
    path, fields = decoded(*[EVEN] * 5), ["string"] * 5
    for order in ("best", "first"):
        assert [p.at for p in places(path, fields, fork_order=order, first=2)] == [2, 3, 4]
        assert [p.at for p in places(path, fields, fork_order=order, first=2, limit=2)] == [2, 3]
        assert [p.at for p in places(path, fields, fork_order=order, limit=9, num_forks=1)] == [0, 1, 2, 3, 4]


def test_a_candidate_is_known_by_what_stands_up_to_it():
    """While a path is written the same positions are candidates as afterwards, under every rule."""
    steps = [(0.3 + at % 7 / 5, [(5, p), (6, 0.9 - p)]) for at, p in enumerate(PROBABILITIES)]
    path = decoded(*steps, varentropy=[at % 3 / 4 for at in range(len(steps))])
    for rule in RULES:
        options = SamplingOptions(rule=rule, fork_order="first", num_forks=99)
        afterwards = {p.at: p.alternatives for p in fork_places(path, ["value"] * len(steps), options=options)}
        for at in range(len(steps)):
            found = is_candidate(decoded(*steps[: at + 1], varentropy=path.varentropy[: at + 1]), at, options=options)
            assert found == is_candidate(path, at, options=options) == afterwards.get(at, [])
        assert afterwards


def test_a_fall_of_the_entropy_is_no_candidate_under_change():
    path = decoded((1.0, EVEN[1]), (0.5, EVEN[1]), (0.8, EVEN[1]))
    assert [bool(is_candidate(path, at, options=SamplingOptions(rule="change"))) for at in range(3)] == [1, 0, 1]
    assert all(is_candidate(path, at, options=SamplingOptions()) for at in range(3))
