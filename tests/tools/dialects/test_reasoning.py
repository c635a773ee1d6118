"""What a model writes while it reasons makes no call."""

from __future__ import annotations

import json

import pytest
from dialect_writers import WRITERS

from ttpa.esm.score import score_call
from ttpa.tools.dialects import DIALECTS

TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"name": "rain", "arguments": {}}
HEADS = [
    "<think>I will emit <tool_call> soon.</think>\n\n",
    "[THINK]Call [rain(x=1)] now?[/THINK]",
    "Or not?\n</think>\n\n",
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", DIALECTS)
def test_calls_are_read_behind_the_reasoning_where_they_stand(name, head):
    written = WRITERS[name]([CALL])
    plain, turn = DIALECTS[name].read(written, TOOLS), DIALECTS[name].read(head + written, TOOLS)
    assert not turn.errors and [(call.name, call.arguments) for call in turn.calls] == [("rain", {})]
    assert turn.text == head + written and head.strip() in turn.content
    (call,), (alone,) = turn.calls, plain.calls
    assert call.name_span == tuple(place + len(head) for place in alone.name_span)
    assert score_call(head + written, [CALL], TOOLS, dialect=name).score == 1.0


def test_a_turn_that_is_cut_off_while_it_reasons_makes_no_call():
    assert score_call(f"<think>Maybe {WRITERS['hermes']([CALL])}", [], TOOLS).score == 1.0


def test_a_tag_inside_of_a_call_ends_no_reasoning():
    text = f"<tool_call>\n{json.dumps({'name': 'rain', 'arguments': {'note': 'a</think>b'}})}\n</tool_call>"
    (call,) = DIALECTS["hermes"].read(text, TOOLS).calls
    assert call.arguments == {"note": "a</think>b"}
