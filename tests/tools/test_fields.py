"""The field classes that sampling and training share; tests/sampling/test_forks.py covers each class of a call."""

from __future__ import annotations

from itertools import groupby

from hesitant import TOOLS

from ttpa.tools.dialects.hermes import parse
from ttpa.tools.fields import character_fields


def runs(text):
    pairs = zip(text, character_fields(parse(text), TOOLS), strict=True)
    return [("".join(c for c, _ in run), field) for field, run in groupby(pairs, key=lambda pair: pair[1])]


def test_tags_are_told_from_text_and_from_what_they_enclose():
    call = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    assert runs(f"a{call}b") == [
        ("a", None),
        ("<tool_call>", "tag"),
        ('\n{"name": ', "bracket"),
        ('"time"', "name"),
        (', "arguments": {}}\n', "bracket"),
        ("</tool_call>", "tag"),
        ("b", None),
    ]


def test_a_call_without_tags_has_no_tag():
    assert {field for _, field in runs('{"name": "time", "arguments": {}}')} == {"bracket", "name"}
