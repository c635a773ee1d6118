import ast
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttpa.tools.json_scan import DEEPEST
from ttpa.tools.python_scan import scan

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
LITERALS = st.recursive(
    SCALARS, lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(), parts, max_size=4), max_leaves=12
)
PLAIN = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]))  # what ast reads as it stands


def every(value):
    yield value
    for part in [member.value for member in value.members] + value.items:
        assert value.span[0] < part.span[0] < part.span[1] <= value.span[1]
        yield from every(part)


@settings(deadline=None)
@given(LITERALS, st.sampled_from(["", " x", "\n\t"]))
def test_reads_what_python_writes_and_every_span_decodes_to_its_value(value, around):
    text = around + repr(value) + around
    read = scan(text, len(around))
    assert read.error is None and read.loose == [] and read.end == len(text) - len(around)
    assert json.dumps(read.root.value) == json.dumps(value)
    for part in every(read.root):
        assert part.closed and json.dumps(ast.literal_eval(text[slice(*part.span)])) == json.dumps(part.value)
        for member in part.members:
            assert ast.literal_eval(text[slice(*member.key_span)]) == member.key


@settings(deadline=None)
@given(LITERALS, st.booleans())
def test_reads_what_json_writes_and_lists_its_words(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    read = scan(text)
    assert read.error is None and read.end == len(text)
    assert json.dumps(read.root.value) == json.dumps(value)
    words = [part for part in every(read.root) if part.value is None or isinstance(part.value, bool)]
    assert read.loose == [part.span for part in words]


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
@settings(deadline=None, max_examples=300)
@given(PLAIN | st.text(alphabet="{}[](),:'\"\\tnxu10TrueNoe_E.-+ \n") | st.text(alphabet="'\"\\x41u0N\n"))
def test_reads_no_text_otherwise_than_python_does(text):
    read = scan(text)
    if read.error is None and read.loose == []:
        value = ast.literal_eval(text[slice(*read.root.span)])
        assert json.dumps(read.root.value) == json.dumps(value)


@settings(deadline=None)
@given(LITERALS, st.data())
def test_a_cut_text_keeps_only_what_the_whole_has(value, data):
    text = repr({"a": value, "b": [value]})
    cut = data.draw(st.integers(0, len(text) - 1))
    read = scan(text[:cut])
    assert read.error is not None and read.error.position <= cut
    if read.root is not None:
        assert not read.root.closed
        for key, part in read.root.value.items():
            if not isinstance(part, dict | list | int | float):
                assert json.dumps(part) == json.dumps({"a": value, "b": [value]}[key])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"""'it\'s "so"'""", 'it\'s "so"'),
        (r'"\x41\u00e4\U0001f600\101\0\a\b\f\n\r\t\v\\\""', 'Aä😀A\0\a\b\f\n\r\t\v\\"'),
        (r"'\d\/'", r"\d\/"),
        ("'a\\\nb'", "ab"),
        (r'"\ud83d\ude00"', "😀"),
        ("'''a\n'b' ''c'''", "a\n'b' ''c"),
        ('""" \\""" """', ' """ '),
        ("-1_000", -1000),
        ("+.5e-1", 0.05),
        ("1.", 1.0),
        ("0" * 6000, 0),
        ("[1, [], {'a': 2,},]", [1, [], {"a": 2}]),
        ("{'a': 1, 'a': 2}", {"a": 2}),
        ("( ( 'a' ) )", "a"),
    ],
)
def test_literals(text, value):
    read = scan(text)
    assert read.error is None and read.loose == [] and read.root.span == (0, len(text))
    assert (read.root.value, type(read.root.value)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "position", "kept"),
    [
        ("", 0, None),
        ("{", 1, {}),
        ("{'a': 1, 'b'", 12, {"a": 1}),
        ("{'a': 1 'b': 2}", 8, {"a": 1}),
        ("{'a': 1,, }", 8, {"a": 1}),
        ("{'a': {'b': [1, 2, ({'c': 3", 27, {"a": {"b": [1, 2, [{"c": 3}]]}}),
        ("{'a': 'xy}", 6, {}),
        ("{'a': '''x'}", 6, {}),
        (r"{'a': 'b\x4'}", 8, {}),
        (r"{'a': '\N{DIGIT ONE}'}", 7, {}),
        (r"{'a': '\U00110000'}", 7, {}),
        ("{'a': name}", 6, {}),
        ("{'a': f(1)}", 6, {}),
        ("{'a': 1 + 2}", 8, {"a": 1}),
        ("{'a': 'b' 'c'}", 10, {"a": "b"}),
        ("{'a': f'b'}", 6, {}),
        ("{'a': 007}", 6, {}),
        ("{'a': 0x10}", 7, {"a": 0}),
        ("{'a': 1e999}", 6, {}),
        ("{1: 2}", 1, {}),
        ("{'a', 'b'}", 4, {}),
        ("[1, 2", 5, [1, 2]),
        ("[" * (DEEPEST + 1), DEEPEST, None),
        ("9" * 400, 0, None),
    ],
)
def test_errors_have_a_position_and_what_was_closed_is_kept(text, position, kept):
    read = scan(text)
    assert read.error.position == read.end == position
    if kept is not None:
        assert read.root.value == kept and not read.root.closed
        assert read.root.span == (0, position)


def test_what_only_a_lenient_reader_accepts_is_listed():
    text = "[(1, (2,)), (), ('a'), true, None, null, 'b\nc', '''d\ne', '''"
    text += ", 'f\\\ng']"
    read = scan(text)
    assert read.error is None
    assert read.root.value == [[1, [2]], [], "a", True, None, None, "b\nc", "d\ne', ", "fg"]
    assert [text[slice(*span)] for span in read.loose] == ["(1, (2,))", "(2,)", "()", "true", "null", "'b\nc'"]


def test_duplicates_are_kept_and_the_last_one_wins():
    read = scan("{'a': 1, 'b': 2, 'a': {'c': 3}}")
    assert read.root.value == {"a": {"c": 3}, "b": 2}
    assert [(member.key, member.value.value) for member in read.root.members] == [("a", 1), ("b", 2), ("a", {"c": 3})]


def test_no_depth_raises_and_no_length_takes_long():
    assert scan("[({'a': " * 100_000).error is not None
    assert scan("[" * DEEPEST + "]" * DEEPEST).error is None
    start = time.process_time()
    for text in ("'" + "\\'" * 200_000, "'''" + "'' " * 100_000, "[" + "(1), " * 50_000, "1_" * 200_000, "-" * 200_000):
        scan(text)
    assert time.process_time() - start < 5.0
