import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttpa.tools.dialects.qwen3_coder import parse

ANY = {"type": ["object", "array", "number", "boolean", "null"]}
KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>\n"), min_size=1, max_size=6)
STRINGS = st.text(max_size=20) | st.lists(
    st.sampled_from(["<parameter=a>", "</parameter>", "</function>", "<tool_call>", "x", " ", '"', "\n", "7", "null"]),
    max_size=6,
).map("".join)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
NESTED = st.recursive(
    SCALARS | STRINGS,
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=4), parts, max_size=3),
    max_leaves=6,
)
# What these tags mean inside a value is the one thing that this way of writing calls leaves open.
AMBIGUOUS = re.compile(r"(?:^|\n)</?(?:tool_call|function|parameter)[=>]")
VALUES = STRINGS.filter(lambda text: not AMBIGUOUS.search(text)) | NESTED.filter(lambda v: not isinstance(v, str))
CALLS = st.lists(st.tuples(KEYS, st.dictionaries(KEYS, VALUES, max_size=4)), max_size=3)


def written(value):
    """As the chat templates write it: containers as JSON, anything else as Python's str does."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def text_of(calls):
    return "\n".join(
        f"<tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={key}>\n{written(value)}\n</parameter>\n" for key, value in arguments.items())
        + "</function>\n</tool_call>"
        for name, arguments in calls
    )


def tools_for(calls):
    tools = {}
    for name, arguments in calls:
        properties = tools.setdefault(name, {})
        for key, value in arguments.items():
            properties.setdefault(key, {"type": "string"} if isinstance(value, str) else ANY)
    return [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
        for name, properties in tools.items()
    ]


def same_types(calls):
    """No key of a tool is a string in one call and something else in another: the schema could not say so."""
    kinds = {}
    return all(
        kinds.setdefault((name, key), isinstance(value, str)) == isinstance(value, str)
        for name, arguments in calls
        for key, value in arguments.items()
    )


def check_spans(turn):
    """Spans lie in the text and nest, whatever the text is."""
    done = 0
    for i, call in enumerate(turn.calls):
        assert call.index == i
        assert done <= call.span[0] <= call.inner_span[0] <= call.inner_span[1] <= call.span[1] <= len(turn.text)
        done = call.span[1]
        for inner in (call.name_span, call.close_span):
            if inner is not None:
                assert call.span[0] <= inner[0] < inner[1] <= call.span[1]
        for pointer, field in call.fields.items():
            assert call.inner_span[0] <= field.value_span[0] <= field.value_span[1] <= call.inner_span[1]
            if pointer:
                outer = call.fields[pointer.rpartition("/")[0]].value_span
                whole = field.element_span or ((field.key_span or field.value_span)[0], field.value_span[1])
                assert outer[0] <= whole[0] <= field.value_span[0] and field.value_span[1] <= whole[1] <= outer[1]
                assert field.key_span is None or whole[0] <= field.key_span[0]
    for error in turn.errors:
        assert -1 <= error.call < len(turn.calls)
        assert 0 <= error.span[0] <= error.span[1] <= len(turn.text)


@settings(deadline=None)
@given(CALLS.filter(same_types), st.sampled_from(["", "Let me see. "]))
def test_valid_turns(calls, before):
    turn = parse(before + text_of(calls), tools_for(calls))
    assert turn.errors == [] and turn.content == before.strip()
    check_spans(turn)
    assert [call.name for call in turn.calls] == [name for name, _ in calls]
    for call, (name, arguments) in zip(turn.calls, calls, strict=True):
        assert call.complete and call.duplicates == []
        assert turn.text[slice(*call.name_span)] == name
        assert json.dumps(call.arguments) == json.dumps(arguments)
        assert turn.text[slice(*call.close_span)] == "</function>"
        assert call.close_span[0] == call.fields[""].value_span[1]
        top = [field for pointer, field in call.fields.items() if pointer.count("/") == 1]
        assert {turn.text[slice(*f.key_span)]: f.value for f in top} == call.arguments
        for pointer, field in call.fields.items():
            text = turn.text[slice(*field.value_span)]
            if pointer.count("/") == 1:
                assert text == written(field.value)
                element = f"<parameter={turn.text[slice(*field.key_span)]}>\n{text}\n</parameter>\n"
                assert turn.text[slice(*field.element_span)] == element
            elif pointer:
                assert json.dumps(json.loads(text)) == json.dumps(field.value)


PIECES = [
    "<tool_call>",
    "</tool_call>",
    "<function=f>",
    "</function>",
    "<parameter=a>",
    "<parameter=b>",
    "</parameter>",
    "\n",
    " ",
    "x",
    '{"a": [1,',
    "[]",
    "'",
    "True",
]


@settings(deadline=None)
@given(
    st.text()
    | st.text(alphabet='<>/=\n tool_callfunctionparameter"{[1')
    | st.lists(st.sampled_from(PIECES)).map("".join)
)
def test_no_text_raises(text):
    turn = parse(text, TOOLS)
    check_spans(turn)
    for call in turn.calls:
        assert (call.name is not None and call.complete) or any(error.call == call.index for error in turn.errors)


@settings(deadline=None)
@given(CALLS.filter(bool), st.data())
def test_mutated_calls_parse_or_say_where_they_break(calls, data):
    text = text_of(calls)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 8)))
    turn = parse(text[:start] + data.draw(st.text(max_size=3)) + text[end:], tools_for(calls))
    check_spans(turn)
    for call in turn.calls:
        readable = call.name is not None and call.arguments is not None and call.complete
        assert readable or any(error.call == call.index for error in turn.errors)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "w",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "where": {"type": "object"}},
                "required": ["city"],
            },
        },
    }
]
CITY = "<parameter=city>\nOslo\n</parameter>\n"
CALL = f"<tool_call>\n<function=w>\n{CITY}</function>\n</tool_call>"


def test_a_call_cut_anywhere_keeps_what_was_closed_and_is_never_silent():
    text = f"<tool_call>\n<function=w>\n{CITY}<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
    for length in range(len("<tool_call>"), len(text)):
        turn = parse(text[:length], TOOLS)
        check_spans(turn)
        (call,) = turn.calls
        assert turn.errors and call.name in (None, "w")
        kept = {"city": "Oslo", "days": 3} if length >= text.index("\n</function>") else {"city": "Oslo"}
        if length >= text.index("\n<parameter=days"):
            assert call.arguments == kept
        assert call.complete == (length >= text.index("</function>") + len("</function>"))


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        (CALL[: -len("\n</tool_call>")], [("format.envelope", 0, "")]),
        (CALL[len("<tool_call>\n") :], [("format.envelope", 0, "<")]),
        (f"{CALL}\n</tool_call>", [("format.envelope", 0, "</tool_call>")]),
        (f"</tool_call> {CALL}", [("format.envelope", -1, "</tool_call>")]),
        (CALL.replace("\n</tool_call>", f"\n{CALL}"), [("format.envelope", 0, "")]),
        (CALL.replace("</function>\n", ""), [("format.envelope", 0, "")]),
        (CALL.replace("\n</parameter>", ""), [("format.envelope", 0, "")]),
        (CALL.replace("\nOslo\n", "Oslo"), [("format.repairable", 0, "<parameter=city>")]),
        (CALL.replace("Oslo\n", "Oslo"), [("format.repairable", 0, "<parameter=city>")]),
        (CALL.replace("\nOslo\n</parameter>\n", "Oslo</parameter>"), [("format.repairable", 0, "<parameter=city>")]),
        (CALL.replace("</function>\n", "</function>\nok "), [("format.unparseable", 0, "ok ")]),
    ],
)
def test_calls_that_can_be_read_in_spite_of_an_error(text, errors):
    turn = parse(text, TOOLS)
    assert [(e.code, e.call, text[slice(*e.span)]) for e in turn.errors] == errors
    check_spans(turn)
    for call in turn.calls:
        assert call.complete and (call.name, call.arguments) == ("w", {"city": "Oslo"})


@pytest.mark.parametrize(
    ("body", "place", "name", "arguments"),
    [
        ("", "", None, None),
        ('{"name": "w", "arguments": {}}', '{"name": "w", "arguments": {}}\n', None, None),
        ("<function=>\n</function>", "<function=>\n</function>\n", None, None),
        (f"<function=w>\n{CITY}now\n</function>", "now\n</function>\n", "w", {"city": "Oslo"}),
        (f"<function=w>\n{CITY}</parameter>\n</function>", "</parameter>\n</function>\n", "w", {"city": "Oslo"}),
    ],
)
def test_broken_bodies(body, place, name, arguments):
    text = f"<tool_call>\n{body}\n</tool_call> {CALL}"
    turn = parse(text, TOOLS)
    (error,) = turn.errors
    assert (error.code, error.call, text[slice(*error.span)]) == ("format.unparseable", 0, place)
    assert (turn.calls[0].name, turn.calls[0].arguments, turn.calls[0].complete) == (name, arguments, False)
    assert turn.calls[0].span == (0, text.index("</tool_call>") + len("</tool_call>"))
    assert (turn.calls[1].name, turn.calls[1].arguments) == ("w", {"city": "Oslo"})


def test_two_functions_in_one_pair_of_tags_are_two_calls():
    function = f"<function=w>\n{CITY}</function>\n"
    turn = parse(f"<tool_call>\n{function}{function}</tool_call>", TOOLS)
    assert [call.arguments for call in turn.calls] == [{"city": "Oslo"}] * 2
    assert [(e.code, e.call) for e in turn.errors] == [("format.envelope", 0), ("format.envelope", 1)]


@pytest.mark.parametrize(
    "value",
    ["", "\n", "two\n\nlines\n", "a </parameter> b", "say <parameter=x> or </function>", "</tool_call>x", "é\t"],
)
def test_strings_may_hold_lines_and_tags(value):
    if value.startswith("<"):
        value = f" {value}"
    text = text_of([("w", {"city": value, "days": 3})])
    turn = parse(text, TOOLS)
    assert turn.errors == [] and turn.calls[0].arguments == {"city": value, "days": 3}
    assert text[slice(*turn.calls[0].fields["/city"].value_span)] == value


def test_nested_values_have_fields_that_stand_where_they_stand():
    where = {"a/b": [1, {"c": "é"}], "d": None}
    text = f"{text_of([('w', {'city': 'Oslo'})])}\n{text_of([('w', {'where': where})])}"
    call = parse(text, TOOLS).calls[1]
    assert list(call.fields) == [
        "",
        "/where",
        "/where/a~1b",
        "/where/a~1b/0",
        "/where/a~1b/1",
        "/where/a~1b/1/c",
        "/where/d",
    ]
    assert text[slice(*call.fields["/where/a~1b/1/c"].value_span)] == '"é"'
    assert text[slice(*call.fields["/where/a~1b"].key_span)] == '"a/b"'
    assert call.fields["/where/d"].element_span is None


def test_duplicate_keys_are_kept():
    where = '<parameter=where>\n{"a": {"x": 1}}\n</parameter>\n'
    text = CALL.replace(CITY, where + CITY + where.replace("x", "y"))
    (call,) = parse(text, TOOLS).calls
    assert call.arguments == {"where": {"a": {"y": 1}}, "city": "Oslo"}
    assert sorted(call.fields) == ["", "/city", "/where", "/where/a", "/where/a/y"]
    ((pointer, field),) = call.duplicates
    assert pointer == "/where" and field == call.fields["/where"]


def test_python_in_a_nested_value_is_repairable():
    text = text_of([("w", {"where": {}})]).replace("{}", "{'a': True}")
    turn = parse(text, TOOLS)
    assert turn.calls[0].arguments == {"where": {"a": True}}
    assert [(e.code, text[slice(*e.span)]) for e in turn.errors] == [("format.repairable", "'a'")]


@pytest.mark.parametrize("text", ["", "hello", "Use <function=w> for that.", "<tool_", "a </function> b"])
def test_text_that_is_no_call(text):
    turn = parse(text)
    assert (turn.calls, turn.errors, turn.content) == ([], [], text)


def test_text_around_calls_is_content():
    turn = parse(f"First.\n{CALL}\nThen.\n{CALL}\n", TOOLS)
    assert len(turn.calls) == 2 and turn.content == "First.\n\nThen."


def test_long_nonsense_is_quick():
    start = time.process_time()
    for text in (
        "<tool_call><function=f><parameter=a>" * 2_000,
        "<tool_call>\n<function=f>\n<parameter=a>\n" * 2_000,
        "<tool_call><function=f><parameter=a>1</parameter>" * 2_000,
        "<function=f>" + "<parameter=a>1</parameter>" * 4_000,
        "</parameter>" + " " * 100_000,
        "<tool_call><function=f>" + "<parameter=a>\n'\n</parameter>" * 2_000,
        "<tool_call>\n" * 4_000,
    ):
        parse(text, TOOLS)
    assert time.process_time() - start < 5.0
