import json
import time
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from turn_checks import ARGUMENTS, CALLS, check_exact, check_no_call_is_broken_in_silence, check_spans, found, mutated

from ttpa.esm.score import score_call
from ttpa.tools.dialects.mistral import MISTRAL, parse
from ttpa.tools.tokens import completion_text

NAMES = st.from_regex(r"[\w.-]{1,8}( [\w.-]{1,8})?", fullmatch=True)
NAMED_CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), max_size=3)
PARTS = [
    "[TOOL_CALLS]",
    "[CALL_ID]",
    "[ARGS]",
    "f",
    '{"name": "f"',
    ', "arguments": ',
    "{}",
    "}",
    "[",
    "]",
    ",",
    "'",
    "\n",
    " ",
    "```json",
    '"{\\"a\\": 1}"',
]


def list_of(calls, dumps=json.dumps, more=""):
    objects = ", ".join(f'{{"name": {dumps(name)}, "arguments": {dumps(args)}{more}}}' for name, args in calls)
    return f"[TOOL_CALLS] [{objects}]" if calls else ""


def named(calls, dumps=json.dumps, behind_name=""):
    return "".join(f"[TOOL_CALLS]{name}{behind_name}[ARGS]{dumps(arguments)}" for name, arguments in calls)


@settings(deadline=None)
@given(CALLS, st.sampled_from(["", "Let me see. "]), st.sampled_from(["", ', "id": "8aZ34bC1x"']), st.booleans())
def test_valid_lists(calls, before, more, ascii_only):
    turn = parse(before + list_of(calls, lambda value: json.dumps(value, ensure_ascii=ascii_only), more))
    assert turn.content == before.strip()
    check_exact(turn, calls)


@settings(deadline=None)
@given(NAMED_CALLS, st.sampled_from(["", "Let me see."]), st.sampled_from(["", "[CALL_ID]8aZ34bC1x"]), st.booleans())
def test_valid_named_calls(calls, before, behind_name, ascii_only):
    turn = parse(before + named(calls, lambda value: json.dumps(value, ensure_ascii=ascii_only), behind_name))
    assert turn.content == before
    check_exact(turn, calls)


@settings(deadline=None)
@given(
    st.text()
    | st.text(alphabet="{}[]\",:\\'tn1 [TOOL_CALLS][ARGS]`name")
    | st.lists(st.sampled_from(PARTS)).map("".join)
)
def test_no_text_raises(text):
    check_spans(parse(text))


@settings(deadline=None)
@given(NAMED_CALLS.filter(bool), st.sampled_from([list_of, named]), st.data())
def test_mutated_calls_parse_or_say_where_they_break(calls, written, data):
    check_no_call_is_broken_in_silence(parse(mutated(data, written(calls))))


@settings(deadline=None)
@given(st.tuples(NAMES, ARGUMENTS), st.sampled_from([list_of, named]), st.data())
def test_a_cut_call_is_never_silent(call, written, data):
    text = written([call])
    turn = parse(text[: data.draw(st.integers(len("[TOOL_CALLS]"), len(text) - 1))])
    assert turn.errors and turn.calls[0].name in (None, call[0])
    check_spans(turn)


GOOD = '{"name": "w", "arguments": {"city": "Oslo"}}'
CALL = '[TOOL_CALLS]w[ARGS]{"city": "Oslo"}'


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        (f"[{GOOD}]", [("envelope", 0, "[")]),
        (f"[TOOL_CALLS] {GOOD}", [("envelope", 0, "")]),
        (f"[TOOL_CALLS] [{GOOD}", [("envelope", 0, "")]),
        (f"[TOOL_CALLS] [{GOOD} {GOOD}]", [("repairable", 0, "{")]),
        (f"[TOOL_CALLS] [{GOOD},]", [("repairable", 0, ",")]),
        (f"[TOOL_CALLS] [{GOOD}}}, {GOOD}]", [("unparseable", 0, "}")]),
        (f"[TOOL_CALLS]```json\n[{GOOD}]\n```", [("repairable", 0, "```json")]),
        ("[TOOL_CALLS][{'name': 'w', 'arguments': {'city': 'Oslo'}}]", [("repairable", 0, "'name'")]),
        ('[TOOL_CALLS][{"name": "w", "arguments": "{\\"city\\": \\"Oslo\\"}"}]', [("repairable", 0, '"')]),
        (f"{CALL}}}{CALL}", [("unparseable", 0, "}")]),
        (CALL.removeprefix("[TOOL_CALLS]"), [("envelope", 0, "w")]),
        (f"{CALL}w[CALL_ID]1[ARGS]{{'city': 'Oslo'}}", [("envelope", 1, "w"), ("repairable", 1, "'city'")]),
        ('[TOOL_CALLS]w{"city": "Oslo"}', [("envelope", 0, "")]),
        ('[TOOL_CALLS] w\n[ARGS] "{\\"city\\": \\"Oslo\\"}"', [("repairable", 0, '"')]),
    ],
)
def test_calls_that_can_be_read_in_spite_of_an_error(text, errors):
    turn = parse(text)
    assert found(turn) == errors and turn.content == ""
    check_spans(turn)
    for call in turn.calls:
        assert call.complete and (call.name, call.arguments) == ("w", {"city": "Oslo"})
        assert text[slice(*call.name_span)].strip("\"'") == "w"


@pytest.mark.parametrize(
    ("body", "code", "place", "name", "arguments"),
    [
        ('w[ARGS]{"city": "Oslo", "days": }', "unparseable", "}", "w", {"city": "Oslo"}),
        ('w[ARGS]{"city": "Oslo", "days": ', "unparseable", "", "w", {"city": "Oslo"}),
        ('w[ARGS]{"city": "Os\nlo"}', "unparseable", '\nlo"}', "w", {}),
        ("w[ARGS]", "unparseable", "", "w", None),
        ("w[ARGS]city", "unparseable", "city", "w", None),
        ("w[ARGS][1]", "envelope", "[1]", "w", None),
        ("[ARGS]{}", "unparseable", "[ARGS]", None, {}),
        ("w", "unparseable", "", None, None),
        (" I call w", "unparseable", " call w", None, None),
        ("", "unparseable", "", None, None),
        ("[]", "unparseable", "]", None, None),
        ('[{"name": "w", "arguments": {"city": "Oslo", "days": ', "unparseable", "", "w", {"city": "Oslo"}),
        ('[{"name": "w", "arguments": {"city": "Oslo"}', "unparseable", "", "w", {"city": "Oslo"}),
        ('[{"name": "w"}]', "envelope", "}", "w", None),
        ('[{"arguments": {}}]', "unparseable", "}", None, {}),
        ('[{"name": 3, "arguments": {}}]', "unparseable", "3", None, {}),
        ("[5]", "unparseable", "5", None, None),
    ],
)
def test_broken_calls_end_before_the_next(body, code, place, name, arguments):
    text = f"[TOOL_CALLS]{body}{CALL}"
    turn = parse(text)
    assert found(turn) == [(code, 0, place)]
    assert (turn.calls[0].name, turn.calls[0].arguments) == (name, arguments)
    assert turn.calls[0].span == (0, len("[TOOL_CALLS]") + len(body))
    assert (turn.calls[1].name, turn.calls[1].arguments) == ("w", {"city": "Oslo"})
    check_spans(turn)


def test_a_call_that_breaks_off_before_its_arguments_is_unfinished():
    for text in ("[TOOL_CALLS]", "[TOOL_CALLS]w", "[TOOL_CALLS]w[CALL_ID]1", "[TOOL_CALLS]w[ARGS]", "[TOOL_CALLS] ["):
        (call,) = parse(text).calls
        assert not call.complete and call.arguments is None and call.close_span is None
    unfinished, call = parse(f"[TOOL_CALLS]```{CALL}").calls  # the tag behind the fence begins no list
    assert not unfinished.complete and call.complete and call.arguments == {"city": "Oslo"}


def test_every_character_of_a_list_belongs_to_one_of_its_calls():
    text = f"[TOOL_CALLS] [{GOOD}, {GOOD}]"
    turn = parse(text)
    assert [text[slice(*call.span)] for call in turn.calls] == [f"[TOOL_CALLS] [{GOOD}", f", {GOOD}]"]
    assert [text[slice(*call.inner_span)] for call in turn.calls] == [GOOD, GOOD]


def test_duplicate_keys_are_kept():
    text = '[TOOL_CALLS]w[ARGS]{"a": {"x": 1}, "b": 2, "a": {"y": 3}}'
    (call,) = parse(text).calls
    assert call.arguments == {"a": {"y": 3}, "b": 2} and sorted(call.fields) == ["", "/a", "/a/y", "/b"]
    ((pointer, field),) = call.duplicates
    assert pointer == "/a" and text[slice(*field.value_span)] == '{"y": 3}'


@pytest.mark.parametrize(
    "text",
    ["", "hello", f"I would write {GOOD} here.", f"Like [{GOOD}]", '{"name": "w"}', '[{"a": 1}]', "[1]", f"[{GOOD}"],
)
def test_text_that_is_no_call(text):
    turn = parse(text)
    assert (turn.calls, turn.errors, turn.content) == ([], [], text.strip())


def test_text_around_calls_is_content():
    turn = parse(f"First.\n{CALL}\nThen.\n[TOOL_CALLS] [{GOOD}]\n")
    assert len(turn.calls) == 2 and turn.errors == [] and turn.content == "First.\n\nThen."
    turn = parse(f'As in [{{"name": "x {CALL}')
    assert len(turn.calls) == 1 and turn.errors == [] and turn.content == 'As in [{"name": "x'


def test_a_completion_cut_behind_a_special_token_is_an_unfinished_call(tokenizer):
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]"]})
    ids = tokenizer("[TOOL_CALLS]w[ARGS]", add_special_tokens=False).input_ids
    assert len(ids) == 3
    text, _ = completion_text(tokenizer, [*ids, tokenizer.eos_token_id], marks=MISTRAL.marks)
    turn = MISTRAL.parse(text, ())
    assert turn.calls[0].name == "w" and not turn.calls[0].complete and found(turn) == [("unparseable", 0, "")]


@pytest.mark.parametrize("written", [list_of, named])
def test_errors_stand_where_the_model_went_wrong(written):
    tool = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "w", "parameters": tool}}]
    gold = [{"name": "w", "arguments": {"city": "Oslo"}}]

    def errors(*calls):
        text = written(calls)
        score = score_call(text, gold, tools, dialect="mistral")
        assert (score.score == 1.0) == (not score.errors)
        return [(error.code, text[slice(*error.span)]) for error in score.errors]

    right = ("w", {"city": "Oslo"})
    assert errors(right) == []
    assert errors(("w", {})) == [("param.missing_required", "}")]
    assert errors(("w", {"city": "Rome"})) == [("value.wrong", '"Rome"')]
    assert errors(("w", {"city": "Oslo", "day": 1})) == [("param.unknown", ', "day": 1')]
    assert errors(("v", {"city": "Oslo"})) == [("tool.unknown", "v" if written is named else '"v"')]
    extra = ', {"name": "w", "arguments": {"city": "Oslo"}}]' if written is list_of else CALL
    assert errors(right, right) == [("call.repeated", extra)]


def test_long_nonsense_is_quick():
    start = time.perf_counter()
    for text in (
        "[TOOL_CALLS]" * 10_000,
        '[TOOL_CALLS]f[ARGS]{"a":' * 5_000,
        '[TOOL_CALLS][{"a":' * 5_000,
        "[TOOL_CALLS]'" * 5_000,
        "[TOOL_CALLS][{'a': \"" * 5_000,
        "f[ARGS]" * 10_000,
        "a" * 50_000 + "[ARGS]" * 5_000,
        '{"name":' * 20_000,
        f"{GOOD} x " * 3_000,
        f"[TOOL_CALLS] [{GOOD}" + f", {GOOD}" * 3_000,
        " " * 50_000 + 'x {"a' * 10_000,
        "[CALL_ID]" * 10_000,
        "```[" * 20_000,
    ):
        check_spans(parse(text))
    assert time.perf_counter() - start < 10.0
