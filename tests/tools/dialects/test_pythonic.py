import ast
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from turn_checks import check_spans, value_at

from ttpa.tools.dialects.pythonic import parse
from ttpa.tools.json_scan import pointer

TAGS = {"": "", "<|python_start|>": "<|python_end|>", "<|tool_call_start|>": "<|tool_call_end|>"}
NAMES = st.from_regex(r"[a-zA-Z_][\w.-]{0,8}", fullmatch=True) | st.sampled_from(
    ["Get Weather", "Market (US) Trends", "User's Tweets v1.0/list", "Stocks, Bonds & Co."]
)
KEYS = st.from_regex(r"[a-z_]{1,6}", fullmatch=True) | st.sampled_from(["from", "a-b", "$top", "a/b", "~", "max size"])
STRINGS = st.text() | st.sampled_from(["it's", 'a "b"', ")]", "<|tool_call_end|>", "[f(a=1)]", "x), g(b=1)]"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | STRINGS
VALUES = st.recursive(
    SCALARS,
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(STRINGS, parts, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(KEYS, VALUES, max_size=4)), min_size=1, max_size=3)


def text_of(calls, *, tag="", dumps=repr):
    written = [f"{name}({', '.join(f'{key}={dumps(value)}' for key, value in a.items())})" for name, a in calls]
    return f"{tag}[{', '.join(written)}]{TAGS[tag]}"


def as_lfm2_writes(value):
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else repr(value)


def check(turn):
    """Spans nest, and the fields are the arguments, whatever the text is."""
    check_spans(turn)
    for call in turn.calls:
        assert call.arguments is None or call.arguments == {k: call.fields[pointer([k])].value for k in call.arguments}


@settings(deadline=None, max_examples=60)
@given(CALLS, st.sampled_from(list(TAGS)), st.sampled_from(["", "Let me see.\n", " \n"]))
def test_valid_turns(calls, tag, before):
    text = text_of(calls, tag=tag)
    turn = parse(before + text + "\n")
    assert turn.errors == [] and turn.content == before.strip() and len(turn.calls) == len(calls)
    check(turn)
    assert "".join(turn.text[slice(*call.span)] for call in turn.calls) == text
    for call, (name, arguments) in zip(turn.calls, calls, strict=True):
        assert call.complete and call.duplicates == []
        assert call.name == name == turn.text[slice(*call.name_span)]
        assert json.dumps(call.arguments) == json.dumps(arguments)
        assert turn.text[slice(*call.inner_span)] == text_of([(name, arguments)])[1:-1]
        assert turn.text[slice(*call.close_span)] == ")"
        assert call.close_span[1] == call.fields[""].value_span[1] == call.inner_span[1]
        for place, field in call.fields.items():
            if not place:
                continue
            written = turn.text[slice(*field.value_span)]
            assert written == repr(field.value) == repr(value_at(arguments, place))
            if field.key_span is not None:
                key = turn.text[slice(*field.key_span)]
                assert pointer([key if place.count("/") == 1 else ast.literal_eval(key)]) == "/" + place.split("/")[-1]


@settings(deadline=None, max_examples=60)
@given(CALLS)
def test_calls_as_lfm2s_template_writes_them(calls):
    turn = parse(text_of(calls, tag="<|tool_call_start|>", dumps=as_lfm2_writes))
    assert turn.errors == []
    check(turn)
    assert [call.name for call in turn.calls] == [name for name, _ in calls]
    assert json.dumps([call.arguments for call in turn.calls]) == json.dumps([arguments for _, arguments in calls])


PARTS = [
    *TAGS,
    *TAGS.values(),
    "[f(",
    "a=1",
    ", ",
    "'",
    '"',
    "]",
    ")",
    "(",
    "{",
    "x",
    "\n",
    "```python",
    "Get It(",
    "=",
]


@settings(deadline=None)
@given(
    st.text() | st.text(alphabet="[]{}()'\"\\=,:fa1 \n.<|") | st.lists(st.sampled_from(PARTS), max_size=20).map("".join)
)
def test_no_text_raises(text):
    check(parse(text))


@settings(deadline=None, max_examples=60)
@given(CALLS, st.sampled_from(["<|python_start|>", "<|tool_call_start|>"]), st.data())
def test_mutated_calls_parse_or_say_where_they_break(calls, tag, data):
    text = text_of(calls, tag=tag)
    start = data.draw(st.integers(len(tag), len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 8)))
    turn = parse(text[:start] + data.draw(st.text(max_size=3)) + text[end:])
    check(turn)
    for call in turn.calls:
        readable = call.name is not None and call.arguments is not None and call.complete
        assert readable or any(error.call == call.index for error in turn.errors)


@settings(deadline=None, max_examples=60)
@given(CALLS, st.sampled_from(list(TAGS)), st.data())
def test_a_cut_turn_is_never_silent(calls, tag, data):
    text = text_of(calls, tag=tag)
    first = len(tag) + len(f"[{calls[0][0]}(")
    turn = parse(text[: data.draw(st.integers(first, len(text) - 1))])
    assert turn.errors and TAGS[tag].startswith(turn.content)
    check(turn)
    whole = turn.calls[: turn.errors[0].call]
    assert [(call.name, repr(call.arguments)) for call in whole] == [(n, repr(a)) for n, a in calls[: len(whole)]]


GOOD = "[w(city='Oslo')]"


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        (f"<|python_start|>{GOOD}", [("format.envelope", 0, "")]),
        (
            f"<|tool_call_start|>{GOOD} <|python_end|>",
            [("format.envelope", 0, ""), ("format.envelope", 0, "<|python_end|>")],
        ),
        (f"{GOOD}\n<|tool_call_end|>", [("format.envelope", 0, "[")]),
        (f"hello <|python_end|>{GOOD}", [("format.envelope", -1, "<|python_end|>")]),
        (f"<|python_start|>{GOOD[1:-1]}<|python_end|>", [("format.envelope", 0, "w")]),
        (GOOD[1:-1], [("format.envelope", 0, "w")]),
        (GOOD[:-1], [("format.envelope", 0, "")]),
        (f"{GOOD[:-1]}<|tool_call_end|>", [("format.envelope", 0, ""), ("format.envelope", 0, "[")]),
        (f"{GOOD[:-1]}\nThen see (a=1)", [("format.envelope", 0, "")]),
        (f"```python\n{GOOD}\n```", [("format.repairable", 0, "```python")]),
        (f"<|python_start|>\n```\n{GOOD}\n```\n<|python_end|>", [("format.repairable", 0, "```")]),
        (f"<|python_start|>{GOOD}, so<|python_end|>", [("format.unparseable", 0, ", so")]),
        ("[w(city='Oslo'))]", [("format.unparseable", 0, ")")]),
        ("[w('x', 2, city='Oslo')]", [("format.envelope", 0, "'x'"), ("format.envelope", 0, "2")]),
        ("[w(city='Oslo', [1])]", [("format.envelope", 0, "[1]")]),
        ("[w(city='Oslo',), ]", []),
        ("[ w ( city = 'Oslo' ) ]", []),
    ],
)
def test_calls_that_can_be_read_in_spite_of_an_error(text, errors):
    turn = parse(text)
    assert [(e.code, e.call, text[slice(*e.span)]) for e in turn.errors] == errors
    (call,) = turn.calls
    assert call.complete and (call.name, call.arguments) == ("w", {"city": "Oslo"})
    check(turn)


@pytest.mark.parametrize(
    ("body", "place", "name", "arguments"),
    [
        ("w(city='Oslo', days=)", ")", "w", {"city": "Oslo"}),
        ("w(city='Oslo', day=Monday)", "Monday)", "w", {"city": "Oslo"}),
        ("w(city='Oslo', day=next(day='Monday'), days=3)", "next(day='Monday'), days=3)", "w", {"city": "Oslo"}),
        ("w(city='Oslo', days=[1, {'a': 2, 'b'])", "])", "w", {"city": "Oslo", "days": [1, {"a": 2}]}),
        ("w(city='Oslo', days=[next()], x=1)", "next()], x=1)", "w", {"city": "Oslo", "days": []}),
        ("w(city='Oslo', days=3 4)", "4)", "w", {"city": "Oslo", "days": 3}),
        ("w(city='it's Oslo')", "s Oslo')", "w", {"city": "it"}),
        ('w(city="Oslo)', '"Oslo)', "w", {}),
        ("w(**{'city': 'Oslo'})", "**{'city': 'Oslo'})", "w", {}),
        ("hello)", "hello)", None, None),
        ("{'name': 'w'} )", "{'name': 'w'} )", None, None),
    ],
)
def test_a_broken_call_hides_none_of_the_others(body, place, name, arguments):
    text = f"<|tool_call_start|>[v(a=1), {body}, w(city='Rome')]<|tool_call_end|>"
    turn = parse(text)
    (error,) = turn.errors
    assert (error.code, error.call, text[slice(*error.span)]) == ("format.unparseable", 1, place)
    assert [(call.name, call.arguments, call.complete) for call in turn.calls] == [
        ("v", {"a": 1}, True),
        (name, arguments, False),
        ("w", {"city": "Rome"}, True),
    ]
    assert text[slice(*turn.calls[1].inner_span)] == body and turn.calls[1].close_span is None
    check(turn)


@pytest.mark.parametrize(
    ("text", "place", "content"),
    [
        ("[w(city=Oslo)] Done.", "Oslo)", "Done."),
        ("[w(city='Oslo\nDone.", "'Oslo\nDone.", ""),
        ("[w(city=Oslo\n[w(city='Oslo')]", "Oslo\n", ""),
        ("<|python_start|>[w(city=Oslo<|python_end|> Done.", "Oslo", "Done."),
        ("<|python_start|>[w(city=Oslo<|python_start|>[w(city='Oslo')]<|python_end|>", "Oslo", ""),
        ("<|python_start|>[w(city=Oslo, day='<|python_end|>')]<|python_end|>", "Oslo, day='", "')]"),
        ("<|python_start|><|python_end|>", "", ""),
    ],
)
def test_what_is_broken_reaches_to_the_end_of_the_list(text, place, content):
    turn = parse(text)
    error = turn.errors[0]
    assert (error.code, error.call, text[slice(*error.span)]) == ("format.unparseable", 0, place)
    assert turn.content == content and not turn.calls[0].complete
    assert all(call.arguments == {"city": "Oslo"} for call in turn.calls[1:])


@pytest.mark.parametrize(
    "name", ["Get Weather", "Market (US) Trends", "User's Tweets v1.0/list", "3D, 2D & Co. (beta)"]
)
def test_names_may_hold_spaces_and_punctuation(name):
    turn = parse(f"[{name}(city='Oslo'), {name}()]")
    assert turn.errors == [] and turn.content == ""
    assert [(call.name, call.arguments) for call in turn.calls] == [(name, {"city": "Oslo"}), (name, {})]


@pytest.mark.parametrize("separator", ["; ", "\n", " "])
def test_a_missing_comma_between_calls_is_reported(separator):
    text = f"[v(a=1){separator}w()]"
    turn = parse(text)
    assert [(e.code, e.call, text[slice(*e.span)]) for e in turn.errors] == [("format.repairable", 0, separator)]
    assert [(call.name, call.arguments) for call in turn.calls] == [("v", {"a": 1}), ("w", {})]


@pytest.mark.parametrize(
    ("written", "value", "plain", "lfm2"),
    [
        ("true", True, "true", "true"),
        ("null", None, "null", "null"),
        ("[1, false]", [1, False], "false", None),
        ('{"a": null}', {"a": None}, "null", None),
        ("'a\nb'", "a\nb", "'a\nb'", None),
        ("(1, 2)", [1, 2], "(1, 2)", "(1, 2)"),
        ("[(1, 2), true]", [[1, 2], True], "(1, 2)", "(1, 2)"),
    ],
)
def test_values_that_are_not_pythons_are_reported_unless_the_template_writes_them(written, value, plain, lfm2):
    for tag, loose in (("", plain), ("<|python_start|>", plain), ("<|tool_call_start|>", lfm2)):
        text = f"{tag}[v(x={written})]{TAGS[tag]}"
        turn = parse(text)
        expected = [] if loose is None else [("format.repairable", 0, loose)]
        assert [(e.code, e.call, text[slice(*e.span)]) for e in turn.errors] == expected
        assert turn.calls[0].complete and turn.calls[0].arguments == {"x": value}


def test_arguments_that_come_twice_are_kept():
    text = "[w(a={'x': 1}, b=2, a={'y': 3})]"
    turn = parse(text)
    (call,) = turn.calls
    assert turn.errors == [] and call.arguments == {"a": {"y": 3}, "b": 2}
    assert sorted(call.fields) == ["", "/a", "/a/y", "/b"]
    ((place, field),) = call.duplicates
    assert place == "/a" and text[slice(*field.value_span)] == "{'y': 3}" and field == call.fields["/a"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "[]",
        "[1, 2]",
        "['f(a=1)']",
        "[a link](https://example.org/?a=1)",
        "- [ ] open\n- [x] done (a=1)",
        "We call it [the mean (n=3)] here, as in [Smith(2020)].",
        "[Smith(2020)] says so.",
        "So says [Smith(2020)]",
        "[see (below)]",
        "f(x) = 3",
        "f(a=1) is the call.",
        "[f",
    ],
)
def test_text_that_is_no_call(text):
    turn = parse(text)
    assert (turn.calls, turn.errors, turn.content) == ([], [], text.strip())


@pytest.mark.parametrize("tag", ["<|python_start|>", "<|tool_call_start|>"])
def test_tags_around_an_empty_list_are_reported(tag):
    text = f"Nothing. {tag}[ ]{TAGS[tag]}"
    turn = parse(text)
    assert [(e.code, e.call, text[slice(*e.span)]) for e in turn.errors] == [("format.envelope", -1, "[ ]")]
    assert (turn.calls, turn.content) == ([], "Nothing.")


def test_a_list_of_arguments_without_keys_is_read_if_it_is_the_whole_turn():
    text = "[f('x')]"
    turn = parse(text)
    assert [(e.code, text[slice(*e.span)]) for e in turn.errors] == [("format.envelope", "'x'")]
    assert (turn.calls[0].name, turn.calls[0].arguments) == ("f", {})


def test_text_around_lists_is_content():
    turn = parse(f"First.\n{GOOD} and\n<|tool_call_start|>{GOOD}<|tool_call_end|>\nThen [Get It(a=1)].\n[Get It(a=1)]")
    assert [call.name for call in turn.calls] == ["w", "w", "Get It"] and turn.errors == []
    assert turn.content == "First.\n and\n\nThen [Get It(a=1)]."


def test_long_nonsense_is_quick():
    start = time.process_time()
    for text in (
        "[f(a=" * 2_000,
        "[f(a=)" * 2_000,
        "[f(a=1) " * 2_000,
        "[f(a='x)]\n" * 2_000,
        "<|python_start|>" * 1_000,
        "<|python_start|>[f(a=" * 1_000,
        "<|tool_call_start|>[f()] x " * 1_000,
        "[" * 50_000,
        "[ " * 50_000,
        "[f" + " " * 100_000,
        "[f(" + " " * 100_000 + "'",
        "[f(" + "a " * 50_000 + "'",
        "[f(a=1)" + " " * 100_000 + "x",
        "[f(a=b" + ")  " * 50_000,
        "[f(a=b), " + "(a), " * 20_000,
        "a (" * 50_000,
        "```\n" * 20_000,
        "[f(" + "a=1, " * 4_000 + ")]",
        "[" + "f(a=1), " * 2_000 + "]",
    ):
        check(parse(text))
    assert time.process_time() - start < 5.0
