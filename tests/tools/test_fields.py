"""The field classes that sampling and training share; tests/sampling/test_forks.py covers each class of a call."""

from __future__ import annotations

from itertools import groupby

import pytest
from dialect_writers import WRITERS
from hesitant import TOOLS

from ttpa.tools.dialects import DIALECTS
from ttpa.tools.dialects.hermes import parse
from ttpa.tools.fields import character_fields
from ttpa.tools.turn import ParsedCall, ParsedTurn


def runs(turn):
    pairs = zip(turn.text, character_fields(turn, TOOLS), strict=True)
    return [("".join(c for c, _ in run), field) for field, run in groupby(pairs, key=lambda pair: pair[1])]


def test_tags_are_told_from_text_and_from_what_they_enclose():
    call = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    assert runs(parse(f"a{call}b")) == [
        ("a", None),
        ("<tool_call>", "tag"),
        ('\n{"name": ', "bracket"),
        ('"time"', "name"),
        (', "arguments": {}}\n', "bracket"),
        ("</tool_call>", "tag"),
        ("b", None),
    ]


def test_a_call_without_tags_has_no_tag():
    assert {field for _, field in runs(parse('{"name": "time", "arguments": {}}'))} == {"bracket", "name"}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_tells_strings_from_values_that_are_chosen_of_few(dialect):
    arguments = {"city": "Rome", "days": 2, "unit": "C", "more": {"at": ["x", None]}}
    turn = DIALECTS[dialect].parse(WRITERS[dialect]([{"name": "weather", "arguments": arguments}]), TOOLS)
    found = [(text.strip("\"'"), field) for text, field in runs(turn) if field in ("name", "key", "string", "value")]
    none = "None" if dialect == "pythonic" else "null"
    assert found == [
        *[("weather", "name"), ("city", "key"), ("Rome", "string"), ("days", "key"), ("2", "value")],
        *[("unit", "key"), ("C", "value"), ("more", "key"), ("at", "key"), ("x", "string"), (none, "value")],
    ]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_broke_off_is_other_but_for_what_was_read_before(dialect):
    whole = WRITERS[dialect]([{"name": "weather", "arguments": {"city": "Rome", "days": 2}}])
    turn = DIALECTS[dialect].parse(whole[: whole.index("days") + 2], TOOLS)
    found = [(text.strip("\"'"), field) for text, field in runs(turn) if field in ("name", "key", "string", "value")]
    assert found == [("weather", "name"), ("city", "key"), ("Rome", "string")]
    assert runs(turn)[-1][1] == "other"


def test_a_call_that_was_read_without_positions_is_other():
    turn = ParsedTurn("f(1)", [ParsedCall(0, "f", {"a": 1}, span=(0, 4))], [], "")
    assert runs(turn) == [("f(1)", "other")]
