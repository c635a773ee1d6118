import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttpa.esm.score import score_tokens
from ttpa.tools.call import Call
from ttpa.tools.dialects.response_template import response_template_dialect

# As a model might come with: calls of its own kind, `!call NAME {ARGUMENTS}!end`.
TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"!call (?P<name>\w+) ",
            "close_pattern": r"!end\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"<\|im_end\|>", "content": "text"},
    },
}
CHAT = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}!call {{ c.function.name }} {{ c.function.arguments | tojson }}!end{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    for name, properties in (("w", {"city": {"type": "string"}, "days": {"type": "integer"}}), ("v", {}))
]


@pytest.fixture
def other(tokenizer):
    fast = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    fast.chat_template, fast.response_template = CHAT, TEMPLATE
    return fast


@pytest.fixture
def parse(other):
    return response_template_dialect(other).parse


def test_each_call_lies_somewhere_in_the_turn(parse):
    text = 'First. !call w {"city": "Łódź", "days": 3}!end!call v {}!end'
    turn = parse(text, TOOLS)
    assert [(c.index, c.name, c.arguments) for c in turn.calls] == [(0, "w", {"city": "Łódź", "days": 3}), (1, "v", {})]
    assert all(c.span == (0, len(text)) and c.complete for c in turn.calls)
    assert all(c.inner_span is c.name_span is c.close_span is None and c.fields == {} for c in turn.calls)
    assert turn.errors == [] and turn.content == "First."


def test_the_schema_of_the_tool_types_values(parse):
    assert parse('!call w {"days": "3"}!end', TOOLS).calls[0].arguments == {"days": 3}
    assert parse('!call w {"days": "3"}!end').calls[0].arguments == {"days": "3"}


@pytest.mark.parametrize("text", ["", " \n", "hello", '{"name": "w"}', "!call"])
def test_text_that_is_no_call(parse, text):
    turn = parse(text, TOOLS)
    assert (turn.calls, turn.errors, turn.content) == ([], [], text.strip())


@pytest.mark.parametrize(
    "body", ["{", "[1]", '"text"', '{"a": NaN}', '{"a": 1e999}', '{"a": ' * 200 + "1" + "}" * 200, "[" * 100_000]
)
def test_what_the_parser_cannot_read_is_an_error_over_the_whole_turn(parse, body):
    text = f"Now !call w {body}!end"
    turn = parse(text, TOOLS)
    (call,), (error,) = turn.calls, turn.errors
    assert (call.name, call.arguments, call.span, call.complete) == (None, None, (0, len(text)), False)
    assert (error.code, error.call, error.span) == ("format.unparseable", 0, (0, len(text)))


PIECES = ["!call w ", "!call ", "!end", "{}", '{"city": "x"}', "{", "[", "\n", "<|im_end|>", "\x01", "\ud800"]


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
def test_no_text_raises(text):
    turn = PARSE(text, TOOLS)
    assert all(call.span == (0, len(text)) for call in turn.calls)
    assert all(call.name is not None or turn.errors for call in turn.calls)


class _Bare:
    response_template = TEMPLATE


PARSE = response_template_dialect(_Bare()).parse


def test_long_nonsense_is_quick(parse):
    start = time.process_time()
    for text in ("!call w {}!end" * 2_000, "!call w " * 5_000, "!call" * 10_000, " " * 100_000):
        parse(text, TOOLS)
    assert time.process_time() - start < 5.0


def test_every_error_of_a_call_stands_at_the_whole_turn(other):
    text = '!call w {"city": "Oslo", "days": 3}!end<|im_end|>'
    ids = other(text)["input_ids"]
    assert score_tokens(other, ids, [Call("w", {"city": "Oslo", "days": 3})], TOOLS).score == 1.0
    score = score_tokens(other, ids, [Call("w", {"city": "Oslo", "days": 4})], TOOLS)
    (error,) = score.errors
    assert (error.code, error.pointer, error.tokens) == ("value.wrong", "/days", (0, len(ids) - 1))
    for code, name in (("tool.wrong", "v"), ("tool.unknown", "x")):
        ids = other(f"!call {name} {{}}!end<|im_end|>")["input_ids"]
        (error,) = score_tokens(other, ids, [Call("w", {})], TOOLS).errors
        assert (error.code, error.tokens) == (code, (0, len(ids) - 1))
    (error,) = score_tokens(other, ids, [{"w": {}}], TOOLS, preset="bfcl").errors
    assert (error.code, error.tokens) == ("tool.unknown", (0, len(ids) - 1))


def test_what_trl_knows_of_a_chat_template_is_used_and_leaves_the_tokenizer_alone(tokenizer, monkeypatch):
    chat_templates = pytest.importorskip("trl.chat_template_utils")
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|call|>")
    other.chat_template = chat_templates.gptoss_chat_template
    turn = response_template_dialect(other).parse(' to=functions.w<|channel|>commentary json<|message|>{"city": "x"}')
    assert [(call.name, call.arguments) for call in turn.calls] == [("w", {"city": "x"})]
    assert getattr(other, "response_template", None) is None
    other.chat_template = CHAT
    assert response_template_dialect(other) is None
    monkeypatch.setitem(sys.modules, "trl", None)  # not installed
    other.chat_template = chat_templates.gptoss_chat_template
    assert response_template_dialect(other) is None
