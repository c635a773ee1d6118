"""Where a trunk is forked."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
from hesitant import TOOLS

from ttpa.sampling.decode import Decoded
from ttpa.sampling.forks import fork_places, token_fields
from ttpa.sampling.options import SamplingOptions

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2, "unit": "C"}}\n</tool_call>'


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
    monkeypatch.setattr("ttpa.sampling.forks.completion_text", lambda tokenizer, ids: (text, spans))
    fields = token_fields(None, range(len(spans)), [{"name": "f"}])
    assert fields == [None, "name", "name", "key", "bracket", None], "the last but one is a bracket and a string"


def decoded(*steps):
    """Steps (entropy, [(token, probability), ..]); the first token of each is the trunk's."""
    return Decoded(
        ids=[likely[0][0] for _, likely in steps],
        finish="stop",
        logps=[0.0] * len(steps),
        entropy=[entropy for entropy, _ in steps],
        top_ids=np.array([[token for token, _ in likely] for _, likely in steps]),
        top_probabilities=np.array([[p for _, p in likely] for _, likely in steps]),
    )


EVEN = (1.0, [(5, 0.5), (6, 0.3), (7, 0.15), (8, 0.01)])


def places(trunk, fields, **options):
    return fork_places(trunk, fields, options=dataclasses.replace(SamplingOptions(), **options))


def test_alternatives_are_the_most_likely_other_tokens():
    (place,) = places(decoded(EVEN), ["string"])
    assert (place.at, place.field, place.score) == (0, "string", 1.0)
    assert place.alternatives == [(6, 0.3), (7, 0.15)]
    (place,) = places(decoded(EVEN), ["string"], alternatives=9)
    assert place.alternatives == [(6, 0.3), (7, 0.15)], "0.01 is less than min_probability"


@pytest.mark.parametrize(
    ("step", "field", "options"),
    [
        (EVEN, None, {}),
        ((0.05, EVEN[1]), "name", {}),
        ((1.0, [(5, 0.9), (6, 0.019)]), "name", {}),
        ((1.0, [(5, 0.9), (6, 0.04)]), "name", {}),
        ((1.0, [(5, 0.995), (6, 0.004)]), "name", {"min_probability": 0.001, "min_ratio": 0.001}),
    ],
    ids=["outside", "entropy", "probability", "ratio", "forced"],
)
def test_floors(step, field, options):
    assert places(decoded(step), [field], **options) == []
    free = {"min_entropy": 0.0, "min_probability": 0.0, "min_ratio": 0.0}
    trunk = decoded(step)
    assert fork_places(trunk, [field or "name"], options=SamplingOptions(**free), forced=1.0) != []


def test_the_best_by_entropy_and_class_are_taken():
    trunk = decoded((1.0, EVEN[1]), (0.9, EVEN[1]), (2.0, EVEN[1]), (0.2, EVEN[1]))
    fields = ["string", "value", "other", "name"]  # scores 1.0, 1.8, 1.0, 0.6
    assert [p.at for p in places(trunk, fields, num_forks=2)] == [0, 1]
    assert [p.at for p in places(trunk, fields, num_forks=3)] == [0, 1, 2]
    assert [p.at for p in places(trunk, fields, min_distance=2)] == [1, 3]
    assert [p.at for p in places(trunk, fields, num_forks=0)] == []
