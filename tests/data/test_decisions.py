"""Decisions: one per assistant message with calls, with gold messages before it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import trl
from hesitant import asking, calling

from ttpa.data.decisions import all_decisions, decisions
from ttpa.errors import InputError
from ttpa.tools.call import Call
from ttpa.tools.dialects.hermes import parse
from ttpa.tools.tokens import completion_text


def two_turns():
    result = {"role": "tool", "content": "sunny"}
    said = {"role": "assistant", "content": "It is sunny."}
    more = {"role": "user", "content": "What time is it?"}
    return asking("d", "Rome", calling("weather", city="Rome"), result, said, more, calling("time"), split="unseen")


def test_every_message_with_calls_is_a_decision(tokenizer):
    found = decisions(two_turns(), tokenizer)
    assert [(d.id, d.turn, d.calls) for d in found] == [
        ("d:1", 1, [Call("weather", {"city": "Rome"})]),
        ("d:5", 5, [Call("time", {})]),
    ]
    assert [len(d.messages) for d in found] == [1, 5]
    assert found[0].dropped is None and found[0].source == {"split": "unseen"}


def test_prompt_is_the_template_and_gold_ends_with_the_end_of_turn(tokenizer):
    dialogue = two_turns()
    for decision in decisions(dialogue, tokenizer):
        expected = tokenizer.apply_chat_template(
            decision.messages, tools=dialogue.tools, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert decision.prompt_ids == expected
        assert decision.gold_ids[-1] == tokenizer.eos_token_id
        assert decision.gold_ids.count(tokenizer.eos_token_id) == 1
        text, _ = completion_text(tokenizer, decision.gold_ids)
        turn = parse(text)
        assert not turn.errors and [Call(c.name, c.arguments) for c in turn.calls] == decision.calls


def test_too_long_decisions_are_returned_as_dropped(tokenizer):
    first, second = decisions(two_turns(), tokenizer)
    length = len(first.prompt_ids) + len(first.gold_ids)
    assert length < len(second.prompt_ids)
    found = all_decisions([two_turns()], tokenizer, max_length=length)
    assert [d.dropped for d in found] == [None, "over max_length"]
    assert decisions(two_turns(), tokenizer, max_length=length - 1)[0].dropped == "over max_length"


def test_a_turn_may_end_with_another_special_token_than_eos(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    found = decisions(two_turns(), tokenizer)
    assert {tokenizer.convert_ids_to_tokens(d.gold_ids[-1]) for d in found} == {"<|im_end|>"}


def test_a_template_that_does_not_end_the_turn_is_refused(tokenizer, monkeypatch):
    calls = "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    text = "{% for m in messages %}{{ m.content }}" + calls + "{% endfor %}|"
    monkeypatch.setattr(tokenizer, "chat_template", text)
    with pytest.raises(InputError, match=r"'d', message 1.*eos_token"):
        decisions(two_turns(), tokenizer)


def test_a_decision_that_the_template_cannot_write_is_dropped(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = (Path(trl.__file__).parent / "chat_templates" / "llama3_1.jinja").read_text()
    other.add_special_tokens({"eos_token": "<|eot_id|>"})
    two = {"role": "assistant", "content": "", "tool_calls": calling("time")["tool_calls"] * 2}
    dialogue = asking("d", "Rome", calling("time"), {"role": "user", "content": "Twice?"}, two)
    (found,) = [d for d in decisions(dialogue, tokenizer) if len(d.calls) == 2]
    assert found.dropped is None
    first, second = decisions(dialogue, other)
    assert first.dropped is None and second.dropped == "the chat template cannot write it"
