import datetime
import json

import pytest

from ttpa.errors import InputError
from ttpa.tools.call import Call, call_from_message, message_with_calls
from ttpa.tools.dialects.hermes import parse
from ttpa.tools.tokens import completion_text

EXACT = Call(
    "weather", {"city": "Köln ✈️", "days": 3, "options": {"unit": "c", "tags": ["a/b", "~", '"q"', "</tool_call>"]}}
)


def test_normal_ignores_key_order_and_integral_floats():
    assert (
        Call("f", {"a": 1, "b": {"c": 2, "d": [1.5]}}).normal()
        == Call("f", {"b": {"d": [1.5], "c": 2.0}, "a": 1.0}).normal()
    )


@pytest.mark.parametrize(
    "other",
    [
        {"a": True, "b": [1, 2]},
        {"a": 1, "b": [2, 1]},
        {"a": "1", "b": [1, 2]},
        {"a": 1},
        {"a": 1, "b": [1, 2], "c": None},
    ],
)
def test_normal_keeps_real_differences(other):
    assert Call("f", {"a": 1, "b": [1, 2]}).normal() != Call("f", other).normal()


def test_normal_differs_by_name():
    assert Call("f", {}).normal() != Call("g", {}).normal()


@pytest.mark.parametrize("arguments", [EXACT.arguments, json.dumps(EXACT.arguments)])
def test_call_from_message_reads_both_shapes(arguments):
    bare = {"name": EXACT.name, "arguments": arguments}
    assert call_from_message(bare) == EXACT
    assert call_from_message({"type": "function", "id": "1", "function": bare}) == EXACT


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("f()", "must be an object"),
        ({"arguments": {}}, '"name"'),
        ({"name": 3, "arguments": {}}, '"name"'),
        ({"function": None}, '"name"'),
        ({"name": "f"}, "must be an object or its JSON text"),
        ({"name": "f", "arguments": [1]}, "must be an object"),
        ({"name": "f", "arguments": "[1]"}, "must be an object"),
        ({"name": "f", "arguments": "{'a': 1}"}, "character 1 "),
        ({"name": "f", "arguments": '{"a": 1} x'}, "character 8 "),
        ({"name": "f", "arguments": '{"a": }'}, "character 6 "),
        ({"name": "f", "arguments": ""}, "character 0 "),
        ({"name": "f", "arguments": {"a": datetime.date(2024, 1, 1)}}, "cannot be written as JSON"),
        ({"name": "f", "arguments": {"a": float("nan")}}, "cannot be written as JSON"),
    ],
)
def test_call_from_message_says_what_is_wrong(record, problem):
    with pytest.raises(InputError, match=problem):
        call_from_message(record)


def test_message_without_calls_has_no_tool_calls():
    assert message_with_calls([], "hello") == {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize("content", ["", "Let me see."])
@pytest.mark.parametrize("calls", [[EXACT], [EXACT, Call("now", {})], []])
def test_rendering_and_parsing_gives_the_same_calls(tokenizer, calls, content):
    question = [{"role": "user", "content": "?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*question, message_with_calls(calls, content)], tokenize=False)
    assert whole.startswith(prompt)
    ids = tokenizer(whole[len(prompt) :].removesuffix("\n"), add_special_tokens=False)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    turn = parse(completion_text(tokenizer, ids)[0])
    assert [Call(call.name, call.arguments) for call in turn.calls] == calls
    assert turn.errors == [] and turn.content == content
