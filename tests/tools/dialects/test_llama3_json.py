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

from ttpa.esm.score import score_call
from ttpa.tools.dialects.llama3_json import parse

TAGS = "<|python_start|><|python_end|>"
PARTS = [
    "<|python_tag|>",
    "<|python_start|>",
    "<|python_end|>",
    '{"name": "f"',
    ', "parameters": ',
    "{}",
    "}",
    ";",
    "[",
    "]",
    ",",
    "'",
    "x",
    "\n",
    " ",
    "```json",
    '"{\\"a\\": 1}"',
]


def text_of(calls, dumps=json.dumps, between="; "):
    return between.join(f'{{"name": {dumps(name)}, "parameters": {dumps(arguments)}}}' for name, arguments in calls)


@settings(deadline=None)
@given(CALLS, st.sampled_from(["", "<|python_tag|>", "\n\n", TAGS]), st.sampled_from(["; ", ";", ""]), st.booleans())
def test_valid_turns(calls, before, between, ascii_only):
    text = text_of(calls, lambda value: json.dumps(value, ensure_ascii=ascii_only), between)
    turn = parse(before + text if calls else text)
    assert turn.content == ""
    check_exact(turn, calls)


@settings(deadline=None)
@given(
    st.text() | st.text(alphabet="{}[]\",:\\'tn1; <|python_tag|>`name") | st.lists(st.sampled_from(PARTS)).map("".join)
)
def test_no_text_raises(text):
    check_spans(parse(text))


@settings(deadline=None)
@given(CALLS.filter(bool), st.data())
def test_mutated_calls_parse_or_say_where_they_break(calls, data):
    check_no_call_is_broken_in_silence(parse(mutated(data, text_of(calls))))


@settings(deadline=None)
@given(CALLS.filter(lambda calls: len(calls) == 1), st.sampled_from(["<|python_tag|>", '{"name":']), st.data())
def test_a_call_cut_behind_its_tag_or_its_first_key_is_never_silent(calls, sign, data):
    text = "<|python_tag|>" + text_of(calls) if sign == "<|python_tag|>" else text_of(calls)
    turn = parse(text[: data.draw(st.integers(len(sign), len(text) - 1))])
    assert turn.errors and turn.calls[0].name in (None, calls[0][0]) and not turn.calls[0].complete
    check_spans(turn)


GOOD = '{"name": "w", "parameters": {"city": "Oslo"}}'


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        (f"{GOOD}\n{GOOD}", [("repairable", 1, "\n")]),
        (f"{GOOD}, {GOOD}", [("repairable", 1, ", ")]),
        (f"{GOOD};\n", [("repairable", 0, ";\n")]),
        (f"[{GOOD}, {GOOD}]", [("repairable", 0, "[")]),
        (f"<|python_tag|>[{GOOD}]", [("repairable", 0, "[")]),
        (f"[{GOOD} {GOOD}]", [("repairable", 0, "["), ("repairable", 0, "{")]),
        (f"[{GOOD},]", [("repairable", 0, "["), ("repairable", 0, ",")]),
        (f"[{GOOD}", [("repairable", 0, "["), ("envelope", 0, "")]),
        (f"```json\n{GOOD}\n```", [("repairable", 0, "```json")]),
        (f"<|python_tag|>```\n[{GOOD}]```", [("repairable", 0, "```"), ("repairable", 0, "[")]),
        ('{"name": "w", "arguments": {"city": "Oslo"}}', [("repairable", 0, '"arguments"')]),
        ('{"name": "w", "parameters": "{\\"city\\": \\"Oslo\\"}"}', [("repairable", 0, '"')]),
        ("{'name': 'w', 'parameters': {'city': 'Oslo'}}", [("repairable", 0, "'name'")]),
        (GOOD + "}", [("unparseable", 0, "}")]),
        (f"{GOOD}}}]; {GOOD}", [("unparseable", 0, "}]")]),
    ],
)
def test_calls_that_can_be_read_in_spite_of_an_error(text, errors):
    turn = parse(text)
    assert found(turn) == errors and turn.content == ""
    check_spans(turn)
    for call in turn.calls:
        assert call.complete and (call.name, call.arguments) == ("w", {"city": "Oslo"})


@pytest.mark.parametrize(
    ("body", "code", "place", "name", "arguments"),
    [
        ('{"name": "w", "parameters": {"city": "Oslo", "days": }}', "unparseable", "}}", "w", {"city": "Oslo"}),
        ('{"name": "w", "parameters": {"city": "Oslo"}', "unparseable", "", "w", {"city": "Oslo"}),
        ('{"name": "w", "parameters": {"city": "Os\nlo"}}', "unparseable", '\nlo"}}', "w", {}),
        ('{"name": "w", parameters', "unparseable", "parameters", "w", None),
        ('{"name": 3, "parameters": {}}', "unparseable", "3", None, {}),
        ('{"name": "w"}', "envelope", "}", "w", None),
        ('{"name": "w", "parameters": [1]}', "envelope", "[1]", "w", None),
        ('{"name": "v", "name": "w", "parameters": {}}', "envelope", '"name"', "w", {}),
        ("<|python_tag|>print(1)", "unparseable", "print(1)", None, None),
        ("<|python_tag|>", "unparseable", "", None, None),
    ],
)
def test_broken_calls_end_before_the_next(body, code, place, name, arguments):
    turn = parse(f"{body}; {GOOD}")
    assert found(turn) == [(code, 0, place)]
    assert (turn.calls[0].name, turn.calls[0].arguments) == (name, arguments)
    assert (turn.calls[1].name, turn.calls[1].arguments) == ("w", {"city": "Oslo"})
    assert turn.calls[0].span == (0, len(body)) and turn.calls[1].complete


def test_what_stands_between_calls_belongs_to_the_one_behind():
    text = f"<|python_tag|>{GOOD} ; {GOOD}; <|python_tag|>{GOOD};"
    spans = [text[slice(*call.span)] for call in parse(text).calls]
    assert spans == [f"<|python_tag|>{GOOD}", f" ; {GOOD}", f"; <|python_tag|>{GOOD};"]
    text = f"[{GOOD}, {GOOD}]"
    assert [text[slice(*call.span)] for call in parse(text).calls] == [f"[{GOOD}", f", {GOOD}]"]
    assert [text[slice(*call.inner_span)] for call in parse(text).calls] == [GOOD, GOOD]


def test_what_a_semicolon_joins_to_a_call_is_a_call_however_broken():
    for rest in ("x", '{"na', '{"x": 1}', "; "):
        turn = parse(f"{GOOD}; {rest}")
        assert len(turn.calls) == 2 and turn.content == "" and turn.errors[0].code == "format.unparseable"


def test_broken_text_parameters():
    turn = parse('{"name": "w", "parameters": "{\\"city\\": \\"Oslo\\", x"}')
    assert found(turn) == [("repairable", 0, '"'), ("unparseable", 0, 'x"')]
    assert turn.calls[0].arguments == {"city": "Oslo"} and not turn.calls[0].complete


@settings(deadline=None)
@given(ARGUMENTS)
def test_fields_of_text_parameters_stand_where_they_stand(arguments):
    text = text_of([("w", json.dumps(arguments))])
    check_text_arguments(parse(text), arguments)


def test_duplicate_keys_are_kept():
    text = '{"name": "w", "parameters": {"a": {"x": 1}, "b": 2, "a": {"y": 3}}}'
    (call,) = parse(text).calls
    assert call.arguments == {"a": {"y": 3}, "b": 2} and sorted(call.fields) == ["", "/a", "/a/y", "/b"]
    ((pointer, field),) = call.duplicates
    assert pointer == "/a" and text[slice(*field.value_span)] == '{"y": 3}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        '{"temperature": 3}',
        '{"name": "Oslo", "population": 700000}',
        '[{"name": "Oslo", "population": 700000}]',
        '[{"a": 1}, {"name": "w", "parameters": {}}]',
        "[1, 2]",
        f"I would write {GOOD} here.",
        f'{{"calls": [{GOOD}]}}',
        'As in {"name": "x',
        '{"na',
    ],
)
def test_text_that_is_no_call(text):
    turn = parse(text)
    assert (turn.calls, turn.errors, turn.content) == ([], [], text.strip())


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"Sure.\n\n  {GOOD}", "Sure."),
        (f"Sure: {GOOD}", "Sure:"),
        (f"Sure:\n{GOOD}\nThat is all.", "Sure:\n\nThat is all."),
        (f"{GOOD} is the call.", "is the call."),
        (f"Sure, <|python_tag|>{GOOD}", "Sure,"),
        (f'As in {{"x <|python_tag|>{GOOD}', 'As in {"x'),
        (f'{{"a": 1}}\n{GOOD}', '{"a": 1}'),
        (f"<|python_start|>Sure.<|python_end|>{GOOD}<|eot|>", "Sure.<|eot|>"),
        (f"<|python_start|>x = 1<|python_end|> {GOOD}", "<|python_start|>x = 1<|python_end|>"),
    ],
)
def test_text_around_a_call_is_content(text, content):
    turn = parse(text)
    assert (turn.errors, turn.content) == ([], content)
    (call,) = turn.calls
    assert call.complete and call.arguments == {"city": "Oslo"}


def test_other_keys_of_a_call_do_no_harm():
    (call,) = parse('{"type": "function", "name": "w", "parameters": {"city": "Oslo"}}').calls
    assert call.name == "w" and call.arguments == {"city": "Oslo"}


def test_errors_stand_where_the_model_went_wrong():
    tool = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "w", "parameters": tool}}]
    gold = [{"name": "w", "arguments": {"city": "Oslo"}}]
    assert score_call(GOOD, gold, tools, dialect="llama3_json").score == 1.0

    def errors(text):
        score = score_call(text, gold, tools, dialect="llama3_json")
        return [(error.code, text[slice(*error.span)]) for error in score.errors]

    assert errors('{"name": "w", "parameters": {}}') == [("param.missing_required", "}")]
    assert errors('{"name": "w", "parameters": {"city": "Rome"}}') == [("value.wrong", '"Rome"')]
    assert errors(f"{GOOD}; {GOOD}") == [("call.repeated", f"; {GOOD}")]
    assert errors('{"city": "Oslo"}') == [("no_call", "")]


def test_long_nonsense_is_quick():
    start = time.perf_counter()
    for text in (
        '{"name":' * 20_000,
        'x {"name":' * 20_000,
        "<|python_tag|>" * 10_000,
        "<|python_tag|>'" * 5_000,
        f"{GOOD} x " * 3_000,
        f"x {GOOD} x " * 3_000,
        f"{GOOD};" * 3_000,
        '{"name": "f", "parameters": {;' * 5_000,
        " " * 50_000 + 'x {"a' * 10_000,
        '[{"' * 20_000,
        "```" * 20_000,
    ):
        check_spans(parse(text))
    assert time.perf_counter() - start < 10.0
