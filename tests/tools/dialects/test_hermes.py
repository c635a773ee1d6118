import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from turn_checks import (
    ARGUMENTS,
    CALLS,
    check_exact,
    check_no_call_is_broken_in_silence,
    check_spans,
    check_text_arguments,
    found,
    mutated,
)

from ttpa.tools.dialects.hermes import parse


def text_of(calls, dumps=json.dumps):
    return "\n".join(
        f'<tool_call>\n{{"name": {dumps(name)}, "arguments": {dumps(arguments)}}}\n</tool_call>'
        for name, arguments in calls
    )


@settings(deadline=None)
@given(CALLS, st.sampled_from(["", "Let me see. "]), st.booleans())
def test_valid_turns(calls, before, ascii_only):
    turn = parse(before + text_of(calls, lambda value: json.dumps(value, ensure_ascii=ascii_only)))
    assert turn.content == before.strip()
    check_exact(turn, calls)


@settings(deadline=None)
@given(
    st.text()
    | st.text(alphabet="{}[]\",:\\'tn1 <tool_call>/`name")
    | st.lists(
        st.sampled_from(
            [
                "<tool_call>",
                "</tool_call>",
                '{"name": "f"',
                ', "arguments": ',
                "{}",
                "}",
                "'",
                "x",
                "\n",
                "```json",
                '"{\\"a\\": 1}"',
            ]
        )
    ).map("".join)
)
def test_no_text_raises(text):
    check_spans(parse(text))


@settings(deadline=None)
@given(CALLS.filter(bool), st.data())
def test_mutated_calls_parse_or_say_where_they_break(calls, data):
    check_no_call_is_broken_in_silence(parse(mutated(data, text_of(calls))))


@settings(deadline=None)
@given(CALLS.filter(lambda calls: len(calls) == 1), st.data())
def test_a_cut_call_is_never_silent(calls, data):
    text = text_of(calls)
    turn = parse(text[: data.draw(st.integers(len("<tool_call>"), len(text) - 1))])
    assert turn.errors and turn.calls[0].name in (None, calls[0][0])
    check_spans(turn)


GOOD = '{"name": "w", "arguments": {"city": "Oslo"}}'
CALL = f"<tool_call>\n{GOOD}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        (f"<tool_call>\n{GOOD}", [("envelope", 0, "")]),
        (f"{GOOD}\n</tool_call>", [("envelope", 0, "{")]),
        (GOOD, [("envelope", 0, "{"), ("envelope", 0, "")]),
        (f"{CALL}\n</tool_call>", [("envelope", 0, "</tool_call>")]),
        ("hello </tool_call>", [("envelope", -1, "</tool_call>")]),
        (f"<tool_call>\n{GOOD}\n{CALL}", [("envelope", 0, "")]),
        (f"<tool_call>\n```json\n{GOOD}\n```\n</tool_call>", [("repairable", 0, "```json")]),
        (
            "<tool_call>\n{'name': 'w', 'arguments': {'city': 'Oslo'}}\n</tool_call>",
            [("repairable", 0, "'name'")],
        ),
        (
            '<tool_call>\n{"name": "w", "arguments": "{\\"city\\": \\"Oslo\\"}"}\n</tool_call>',
            [("repairable", 0, '"')],
        ),
        (f"<tool_call>\n{GOOD}}}\n</tool_call>", [("unparseable", 0, "}\n")]),
    ],
)
def test_calls_that_can_be_read_in_spite_of_an_error(text, errors):
    turn = parse(text)
    assert found(turn) == errors
    for call in turn.calls:
        assert call.complete and (call.name, call.arguments) == ("w", {"city": "Oslo"})


@pytest.mark.parametrize(
    ("body", "code", "place", "name", "arguments"),
    [
        ('{"name": "w", "arguments": {"city": "Oslo", "days": }}', "unparseable", "}}\n", "w", {"city": "Oslo"}),
        ('{"name": "w", "arguments": {"city": "Oslo"}', "unparseable", "", "w", {"city": "Oslo"}),
        ('{"name": "w", "arguments": {"city": "Os\nlo"}}', "unparseable", '\nlo"}}\n', "w", {}),
        ("[1]", "unparseable", "[1]", None, None),
        ('{"arguments": {}}', "unparseable", "}", None, {}),
        ('{"name": 3, "arguments": {}}', "unparseable", "3", None, {}),
        ('{"name": "w"}', "envelope", "}", "w", None),
        ('{"name": "w", "arguments": [1]}', "envelope", "[1]", "w", None),
        ('{"name": "v", "name": "w", "arguments": {}}', "envelope", '"name"', "w", {}),
        ("", "unparseable", "", None, None),
    ],
)
def test_broken_bodies(body, code, place, name, arguments):
    text = f"<tool_call>\n{body}\n</tool_call> {CALL}"
    turn = parse(text)
    (error,) = turn.errors
    assert (error.code, error.call, text[slice(*error.span)]) == (f"format.{code}", 0, place)
    assert (turn.calls[0].name, turn.calls[0].arguments) == (name, arguments)
    assert turn.calls[0].span == (0, text.index("</tool_call>") + len("</tool_call>"))
    assert (turn.calls[1].name, turn.calls[1].arguments) == ("w", {"city": "Oslo"})


def test_broken_text_arguments():
    text = '<tool_call>\n{"name": "w", "arguments": "{\\"city\\": \\"Oslo\\", x"}\n</tool_call>'
    turn = parse(text)
    assert [(e.code, text[slice(*e.span)]) for e in turn.errors] == [
        ("format.repairable", '"'),
        ("format.unparseable", 'x"'),
    ]
    assert turn.calls[0].arguments == {"city": "Oslo"} and not turn.calls[0].complete


@settings(deadline=None)
@given(ARGUMENTS)
def test_fields_of_text_arguments_stand_where_they_stand(arguments):
    text = text_of([("w", json.dumps(arguments))])
    check_text_arguments(parse(text), arguments)


def test_duplicate_keys_are_kept():
    text = '<tool_call>\n{"name": "w", "arguments": {"a": {"x": 1}, "b": 2, "a": {"y": 3}}}\n</tool_call>'
    (call,) = parse(text).calls
    assert call.arguments == {"a": {"y": 3}, "b": 2}
    assert sorted(call.fields) == ["", "/a", "/a/y", "/b"]
    ((pointer, field),) = call.duplicates
    assert pointer == "/a" and text[slice(*field.value_span)] == '{"y": 3}' and field == call.fields["/a"]


@pytest.mark.parametrize(
    "text", ["", "hello", f"I would write {GOOD} here.", '{"name": "w"}', '{"name": "w", "arguments": ']
)
def test_text_that_is_no_call(text):
    turn = parse(text)
    assert (turn.calls, turn.errors, turn.content) == ([], [], text.strip())


def test_an_object_in_an_explanation_hides_no_call():
    (call,) = parse(f'As in {{"name": "x {CALL}').calls
    assert call.complete and call.arguments == {"city": "Oslo"}


def test_long_nonsense_is_quick():
    start = time.perf_counter()
    for text in ('{"name":' * 20_000, "<tool_call>" * 5_000, f"{GOOD} x " * 5_000, "<tool_call>'" * 5_000):
        parse(text)
    assert time.perf_counter() - start < 5.0


def test_text_around_calls_is_content():
    turn = parse(f"First.\n{CALL}\nThen.\n{CALL}\n")
    assert len(turn.calls) == 2 and turn.content == "First.\n\nThen."
