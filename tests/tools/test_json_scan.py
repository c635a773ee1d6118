import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttpa.tools.json_scan import DEEPEST, pointer, scan

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = st.recursive(
    SCALARS, lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(), parts, max_size=4), max_leaves=12
)


def spans_nest(value, inside):
    start, end = value.span
    assert inside[0] <= start < end <= inside[1]
    at = start
    for member in value.members:
        assert at < member.key_span[0] < member.key_span[1] < member.value.span[0]
        at = member.value.span[1]
        spans_nest(member.value, value.span)
    for item in value.items:
        assert at <= item.span[0]
        at = item.span[1]
        spans_nest(item, value.span)


def every(value):
    yield value
    for part in [member.value for member in value.members] + value.items:
        yield from every(part)


@settings(deadline=None)
@given(JSON, st.booleans(), st.sampled_from([None, 2]), st.sampled_from(["", " x", "\n\t"]))
def test_reads_what_json_reads_and_every_span_decodes_to_its_value(value, ascii_only, indent, around):
    text = around + json.dumps(value, ensure_ascii=ascii_only, indent=indent) + around
    read = scan(text, len(around))
    assert read.error is None and read.loose == [] and read.end == len(text) - len(around)
    assert json.dumps(read.root.value) == json.dumps(value)
    spans_nest(read.root, (0, len(text)))
    for part in every(read.root):
        assert part.closed and json.dumps(json.loads(text[slice(*part.span)])) == json.dumps(part.value)
        for member in part.members:
            assert json.loads(text[slice(*member.key_span)]) == member.key


@settings(deadline=None)
@given(JSON, st.data())
def test_a_cut_text_keeps_only_what_the_whole_has(value, data):
    text = json.dumps({"a": value, "b": [value]})
    cut = data.draw(st.integers(0, len(text) - 1))
    read = scan(text[:cut])
    assert read.error is not None and read.error.position <= cut
    if read.root is not None:
        assert not read.root.closed
        for key, part in read.root.value.items():
            whole = json.loads(text)[key]
            if not isinstance(part, dict | list | int | float):
                assert json.dumps(part) == json.dumps(whole)


@settings(deadline=None)
@given(st.text() | st.text(alphabet="{}[]\",:\\'tnu10eE.-+ \n"))
def test_agrees_with_json_on_any_text(text):
    read = scan(text)
    try:
        value = json.loads(text, parse_constant=lambda word: (_ for _ in ()).throw(ValueError(word)))
    except ValueError:
        assert read.error or read.loose or text[read.end :].strip(" \t\n\r")
    else:
        assert read.error is None and json.dumps(read.root.value) == json.dumps(value)


@pytest.mark.parametrize(
    ("text", "position", "kept"),
    [
        ("", 0, None),
        ("{", 1, {}),
        ('{"a": 1, "b"', 12, {"a": 1}),
        ('{"a": 1, "b": ', 14, {"a": 1}),
        ('{"a": 1 "b": 2}', 8, {"a": 1}),
        ('{"a": 1, }', 9, {"a": 1}),
        ('{"a": {"b": [1, 2, {"c": 3', 26, {"a": {"b": [1, 2, {"c": 3}]}}),
        ('{"a": "x\ny"}', 8, {}),
        ('{"a": "xy}', 6, {}),
        ('{"a": nul}', 6, {}),
        ('{"a": NaN}', 6, {}),
        ('{"a": 1e999}', 6, {}),
        ("[1, 2", 5, [1, 2]),
        ("{3: 4}", 1, {}),
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


def test_no_depth_raises():
    assert scan("[" * 100_000).error.position == DEEPEST
    assert scan("[" * DEEPEST + "]" * DEEPEST).error is None


def test_duplicates_are_kept_and_the_last_one_wins():
    read = scan('{"a": 1, "b": 2, "a": {"c": 3}}')
    assert read.root.value == {"a": {"c": 3}, "b": 2}
    assert [(member.key, member.value.value) for member in read.root.members] == [("a", 1), ("b", 2), ("a", {"c": 3})]


def test_python_literals_are_read_and_listed():
    text = r"""{'a"b': 'it\'s \u00e4', "c": [True, None, false]}"""
    read = scan(text)
    assert read.error is None
    assert read.root.value == {'a"b': "it's ä", "c": [True, None, False]}
    assert [text[slice(*span)] for span in read.loose] == ["'a\"b'", r"'it\'s \u00e4'", "True", "None"]


def test_pointer_escapes():
    assert pointer(()) == ""
    assert pointer(("a/b", "m~n", 0, "")) == "/a~1b/m~0n/0/"
