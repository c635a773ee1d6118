"""From token ids to values and errors, in every dialect: nothing that is found lacks its place in text and tokens."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
from dialect_writers import NOISE, WRITERS, value_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ttpa.esm.presets import NAMES
from ttpa.esm.score import score_tokens
from ttpa.tools.completion import read_completion
from ttpa.tools.dialects import DIALECTS
from ttpa.tools.json_scan import pointer

TYPES = {
    "city": st.text(max_size=8) | st.sampled_from(["Köln ✈️", "a 'b' \"c\"\\", "a </tool_call>", "{}", "7", "x, y=[1"]),
    "days": st.integers(-(10**20), 10**20),
    "share": st.floats(allow_nan=False, allow_infinity=False),
    "now": st.booleans() | st.none(),
    "tags": st.lists(st.text(max_size=3) | st.integers() | st.none(), max_size=3),
    "place": st.recursive(
        st.none() | st.booleans() | st.text(max_size=4),
        lambda part: st.lists(part, max_size=2) | st.dictionaries(st.text(max_size=3), part, max_size=2),
        max_leaves=5,
    ).map(lambda value: {"a/b~": value}),
}
SCHEMAS = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "share": {"type": "number"},
    "now": {"type": ["boolean", "null"]},
    "tags": {"type": "array"},
    "place": {"type": "object"},
}
PARAMETERS = {"type": "object", "properties": SCHEMAS, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("weather", "wind")]
ARGUMENTS = st.fixed_dictionaries({}, optional=TYPES)
CALLS = st.lists(
    st.builds(lambda name, given: {"name": name, "arguments": given}, st.sampled_from(["weather", "wind"]), ARGUMENTS),
    max_size=3,
)
EVERY_DIALECT = pytest.mark.parametrize("dialect", DIALECTS)


@pytest.fixture(scope="module")
def merged(tokenizer):
    """As `tokenizer`, but with merges, so that tokens hold several characters, and the marks of all dialects."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    call = {
        "name": "weather",
        "arguments": {"city": "Köln ✈️", "days": 12, "tags": ["a", None], "place": {"a/b~": True}},
    }
    texts = [writer([call, call]) for writer in WRITERS.values()] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=tokenizer.eos_token)
    marks = dict.fromkeys(mark for dialect in DIALECTS.values() for mark in dialect.marks)
    fast.add_special_tokens({"additional_special_tokens": list(marks)})
    return fast


def speaking(tokenizer, dialect):
    tokenizer = copy.copy(tokenizer)
    tokenizer.tool_dialect = dialect
    return tokenizer


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@st.composite
def broken(draw, dialect):
    """The text of some calls, cut and mixed with noise."""
    text = WRITERS[dialect](draw(CALLS))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text)))
        text = text[:start] + draw(st.sampled_from(NOISE)) + text[start + draw(st.integers(0, 12)) :]
    return text


def value_at(arguments, path):
    for part in path:
        arguments = arguments[part]
    return arguments


def paths(value, path=()):
    """The paths of a value and of all that is in it."""
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(part, (*path, key))


def contains(outer, inner):
    return outer[0] <= inner[0] <= inner[1] <= outer[1]


def check_nesting(turn):
    """Calls stand one behind the other, their parts inside of them and beside each other."""
    done = 0
    for call in turn.calls:
        assert done <= call.span[0] <= call.span[1] <= len(turn.text) and contains(call.span, call.inner_span)
        done = call.span[1]
        whole = call.fields[""].value_span if "" in call.fields else call.span
        for part in (call.name_span, call.close_span, whole):
            assert part is None or contains(call.span, part)
        leaves = [call.name_span] if call.name_span is not None else []
        for where, field in call.fields.items():
            parent = call.fields[where.rpartition("/")[0]] if where else field
            assert contains(parent.value_span, field.value_span)
            if field.key_span is not None:
                leaves.append(field.key_span)
                outer = field.element_span or (field.key_span[0], field.value_span[1])
                assert contains(whole, outer) and contains(outer, field.key_span) and contains(outer, field.value_span)
                assert field.key_span[1] <= field.value_span[0]
            if not isinstance(field.value, dict | list):
                leaves.append(field.value_span)
        leaves.sort()
        assert all(left[1] <= right[0] for left, right in pairwise(leaves))


def test_every_dialect_has_a_writer():
    assert set(WRITERS) == set(DIALECTS)


@EVERY_DIALECT
@settings(deadline=None, max_examples=40)
@given(calls=CALLS, before=st.sampled_from(["", "Let me see. "]))
def test_every_value_of_a_completion_decodes_to_what_was_written(merged, dialect, calls, before):
    tokenizer = speaking(merged, dialect)
    ids = ids_of(tokenizer, f"{before}{WRITERS[dialect](calls)}<|im_end|>")
    turn, spans = read_completion(tokenizer, ids, TOOLS)
    assert turn.errors == [] and turn.content == before.strip()
    assert [(call.name, call.complete) for call in turn.calls] == [(call["name"], True) for call in calls]
    assert len(spans) == len(ids) and f"{turn.text}<|im_end|>" == tokenizer.decode(ids)
    check_nesting(turn)
    for call, wanted in zip(turn.calls, calls, strict=True):
        assert turn.text[slice(*call.name_span)].strip('"') == wanted["name"]
        assert json.dumps(call.arguments) == json.dumps(wanted["arguments"])
        assert set(call.fields) == {pointer(path) for path in paths(wanted["arguments"])}
        for path in paths(wanted["arguments"]):
            if path:
                field, value = call.fields[pointer(path)], value_at(wanted["arguments"], path)
                read = value_of(
                    dialect, turn.text[slice(*field.value_span)], top=len(path) == 1, string=isinstance(value, str)
                )
                assert json.dumps(read) == json.dumps(field.value) == json.dumps(value)


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n"])
def test_a_special_token_that_closes_a_call_is_a_part_of_it_at_the_end_too(merged, end):
    text = "<|tool_call_start|>[weather(city='Oslo')]<|tool_call_end|>"
    turn, _ = read_completion(speaking(merged, "pythonic"), ids_of(merged, text + end), TOOLS)
    assert turn.text == text and turn.errors == []


@EVERY_DIALECT
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_spans_nest_in_broken_text_too(dialect, data):
    check_nesting(DIALECTS[dialect].parse(data.draw(broken(dialect)), TOOLS))


@EVERY_DIALECT
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_wherever_a_turn_is_cut_spans_nest(dialect, data):
    text = WRITERS[dialect](data.draw(CALLS.filter(bool)))
    for length in range(len(text)):
        check_nesting(DIALECTS[dialect].parse(text[:length], TOOLS))


@EVERY_DIALECT
@settings(deadline=None, max_examples=60)
@given(data=st.data(), gold=CALLS, preset=st.sampled_from(NAMES))
def test_every_error_has_its_tokens(merged, dialect, data, gold, preset):
    tokenizer = speaking(merged, dialect)
    text = data.draw(broken(dialect))
    ids = ids_of(tokenizer, f"{text}<|im_end|>")
    answers = [{call["name"]: {key: [value] for key, value in call["arguments"].items()}} for call in gold]
    score = score_tokens(tokenizer, ids, answers if preset == "bfcl" else gold, TOOLS, preset=preset)
    _, spans = read_completion(tokenizer, ids, TOOLS)
    for error in score.errors:
        first, last = error.tokens
        assert 0 <= first < last <= len(ids), "the end of turn is the place of what is missing at the end"
        start, end = error.span
        overlap = [i for i, (a, b) in enumerate(spans) if a < max(end, start + 1) and start < b]
        assert list(range(first, last)) == overlap


@EVERY_DIALECT
@settings(deadline=None, max_examples=40)
@given(data=st.data(), gold=CALLS.filter(bool))
def test_where_a_completion_is_cut_only_errors_without_text_have_no_token(merged, dialect, data, gold):
    tokenizer = speaking(merged, dialect)
    ids = ids_of(tokenizer, data.draw(broken(dialect)))
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    for error in score_tokens(tokenizer, ids, gold, TOOLS).errors:
        first, last = error.tokens
        assert first < last or (error.span[0] == error.span[1] and first == last == len(ids))
