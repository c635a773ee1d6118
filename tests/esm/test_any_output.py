"""Whatever a model writes, every preset scores it."""

import pytest
from dialect_writers import NOISE, WRITERS
from hypothesis import given, settings
from hypothesis import strategies as st

from ttpa.esm.presets import NAMES
from ttpa.esm.score import score_call
from ttpa.tools.dialects import DIALECTS

POINT = {
    "type": "object",
    "properties": {"x": {"type": "number", "multipleOf": 0.5}, "next": {"$ref": "#/$defs/point"}},
}
PROPERTIES = {
    "city": {"type": "string", "pattern": "^[A-Z]", "default": "Oslo"},
    "days": {"type": "integer", "minimum": 1},
    "when": {"type": "string", "format": "date-time"},
    "day": {"type": "string", "format": "date"},
    "mail": {"type": "string", "format": "email"},
    "host": {"anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]},
    "id": {"type": "string", "format": "uuid"},
    "at": {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]},
    "tags": {"type": "array", "items": {"enum": ["a", 1, None]}, "uniqueItems": True},
}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["city"], "$defs": {"point": POINT}}
TOOLS = [{"type": "function", "function": {"name": "w", "parameters": PARAMETERS}}, {"name": "now"}]
RANGE = {"toolrl": (-3.0, 3.0), "tl_training": (-2.0, 1.0)}

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS | st.sampled_from(["Oslo", 3, "2026-01-31", "2026-01-31T10:00:00Z", "a@b", "::1", "1.2.3.4", 1e308]),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.sampled_from(["x", "next", "y"]), parts, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.sampled_from([*PROPERTIES, "wind"]), VALUES, max_size=5)
CALLS = st.lists(
    st.builds(lambda n, a: {"name": n, "arguments": a}, st.sampled_from(["w", "now", "x"]), ARGUMENTS), max_size=3
)
GOLD = CALLS.map(lambda calls: [call for call in calls if call["name"] != "x"])
PIECES = st.text(max_size=8) | st.sampled_from(NOISE)


@st.composite
def texts(draw, dialect):
    """The text of some calls, cut and mixed with noise."""
    text = WRITERS[dialect](draw(CALLS))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        text = text[:start] + draw(PIECES) + text[start + draw(st.integers(0, 12)) :]
    return text


def answers(gold):
    """The gold calls as BFCL has them, each value its only alternative."""
    return [{call["name"]: {key: [value] for key, value in call["arguments"].items()}} for call in gold]


def check(output, gold, preset, dialect):
    score = score_call(output, answers(gold) if preset == "bfcl" else gold, TOOLS, preset=preset, dialect=dialect)
    low, high = RANGE.get(preset, (0.0, 1.0))
    assert low <= score.score <= high and score.valid == (not score.errors)
    length = len(output) if isinstance(output, str) else -1
    for error in score.errors:
        assert (error.span is None) if length < 0 else (0 <= error.span[0] <= error.span[1] <= length), error


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("preset", NAMES)
@settings(deadline=None, max_examples=12)
@given(data=st.data(), gold=GOLD)
def test_never_raises(preset, dialect, data, gold):
    check(data.draw(st.text() | texts(dialect) | CALLS), gold, preset, dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
@settings(deadline=None, max_examples=12)
@given(data=st.data(), gold=GOLD)
def test_a_table_of_penalties_never_raises(tmp_path_factory, dialect, data, gold):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text("value.near: 0\nno_call: 0.5\ncall.extra: 0\ncall.missing: 0\nformat.envelope: 0\n")
    check(data.draw(texts(dialect) | CALLS), gold, str(path), dialect)


# in qwen3_coder values have only the types that their schema admits: tests/esm/test_spans.py
@pytest.mark.parametrize("dialect", [name for name in DIALECTS if name != "qwen3_coder"])
@pytest.mark.parametrize("preset", ["strict", "binary"])
@settings(deadline=None, max_examples=15)
@given(gold=GOLD)
def test_gold_itself_is_right(preset, dialect, gold):
    for output in (gold, WRITERS[dialect](gold)):
        score = score_call(output, gold, TOOLS, preset=preset, dialect=dialect)
        assert score.valid and score.score == 1.0
