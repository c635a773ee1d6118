"""Where errors stand in calls that are not written as Hermes does; tests/esm/test_strict.py has those that are."""

from __future__ import annotations

import pytest
from dialect_writers import WRITERS
from hesitant import TOOLS

from ttpa.esm.differences import Difference
from ttpa.esm.places import difference_span
from ttpa.esm.score import score_call
from ttpa.tools.dialects import DIALECTS
from ttpa.tools.turn import ParsedCall

GOLD = [{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}]


def places(dialect, **arguments):
    """The text of each error of a call with these arguments, by its code."""
    text = WRITERS[dialect]([{"name": "weather", "arguments": arguments}])
    score = score_call(text, GOLD, TOOLS, dialect=dialect)
    return {error.code: text[slice(*error.span)] for error in score.errors}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_missing_parameter_is_where_the_arguments_end(dialect):
    (place,) = places(dialect, city="Oslo").values()
    assert place == {"pythonic": ")", "qwen3_coder": "</function>"}.get(dialect, "}")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_surplus_parameter_is_all_of_it_and_a_wrong_value_itself(dialect):
    found = places(dialect, city="Oslo", days=4, wind="no")
    assert found["value.wrong"] == "4"
    surplus = {"pythonic": ", wind='no'", "qwen3_coder": "<parameter=wind>\nno\n</parameter>\n"}
    assert found["param.unknown"] == surplus.get(dialect, ', "wind": "no"')


def test_where_nothing_ends_the_arguments_it_is_the_end_of_the_call():
    text = "<tool_call>\n<function=weather>\n<parameter>\n</function>\n</tool_call>"
    errors = [e for e in score_call(text, GOLD, TOOLS, dialect="qwen3_coder").errors if e.code.startswith("param.")]
    assert len(errors) == 2
    for error in errors:
        start, end = error.span
        assert start == end and text[start:] == "</tool_call>"


def test_in_a_call_that_was_read_without_positions_it_is_the_whole_call():
    call = ParsedCall(0, "weather", {"city": "Rome"}, span=(2, 9))
    for code in ("param.missing_expected", "value.wrong", "param.unknown"):
        assert difference_span("0123456789", call, Difference(code, ("city",), None, None)) == (2, 9)
