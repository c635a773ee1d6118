import json

import pytest

from ttpa.errors import InputError
from ttpa.esm.score import score_call, score_tokens
from ttpa.tools.call import Call

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "w",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city", "days"],
            },
        },
    }
]
GOLD = {"name": "w", "arguments": {"city": "Köln", "days": 3}}
TEXT = '<tool_call>\n{"name": "w", "arguments": {"city": "Köln", "days": 3}}\n</tool_call>'


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_every_kind_of_output_and_gold():
    openai = {"type": "function", "id": "x", "function": {"name": "w", "arguments": json.dumps(GOLD["arguments"])}}
    for output in (TEXT, [GOLD], [Call(**GOLD)], [openai]):
        for gold in ([GOLD], [Call(**GOLD)], [openai]):
            assert score_call(output, gold, TOOLS).score == 1.0


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"unknown preset 'loose'.*strict, release"):
        score_call(TEXT, [GOLD], TOOLS, preset="loose")
    with pytest.raises(InputError, match='"name"'):
        score_call(TEXT, [{"arguments": {}}], TOOLS)
    with pytest.raises(InputError, match="tool 0"):
        score_call(TEXT, [GOLD], [{}])
    deep = 1
    for _ in range(500):
        deep = [deep]
    with pytest.raises(InputError, match="nested too deeply"):
        score_call([{"name": "w", "arguments": {"city": deep}}], [GOLD], TOOLS)


@pytest.mark.parametrize(
    ("change", "code", "tokens"),
    [
        (('"Köln"', '"Bonn"'), "value.wrong", '"Bonn"'),
        (('"days": 3', '"days": "3"'), "value.type", '"3"'),
        ((', "days": 3', ""), "param.missing_required", "}"),
        (('"w"', '"v"'), "tool.unknown", '"v"'),
        ((TEXT, "Köln?"), "no_call", "<|im_end|>"),
        (("\n</tool_call>", ""), "format.envelope", "<|im_end|>"),
        (("3}}", "3}"), "format.unparseable", "</tool_call>"),
    ],
)
@pytest.mark.parametrize("preset", ["strict", "release"])
def test_errors_carry_their_tokens(tokenizer, preset, change, code, tokens):
    text = TEXT.replace(*change)
    assert text != TEXT
    ids = encode(tokenizer, text + "<|im_end|>")
    score = score_tokens(tokenizer, ids, [GOLD], TOOLS, preset=preset)
    (error,) = score.errors
    assert error.code == code
    start, end = error.tokens
    assert tokenizer.decode(ids[start:end]) == tokens
    assert score.score == score_call(text, [GOLD], TOOLS, preset=preset).score


def test_the_missing_parameter_is_the_closing_brace_of_the_arguments(tokenizer):
    text = TEXT.replace(', "days": 3', "")
    (error,) = score_tokens(tokenizer, encode(tokenizer, text), [GOLD], TOOLS).errors
    assert error.span == (text.index("}"), text.index("}") + 1)
    assert error.tokens[1] - error.tokens[0] == 1


def test_a_missing_call_is_the_end_of_turn(tokenizer):
    ids = encode(tokenizer, TEXT + "<|im_end|>")
    (error,) = score_tokens(tokenizer, ids, [GOLD, GOLD], TOOLS).errors
    assert (error.code, error.tokens) == ("call.missing", (len(ids) - 1, len(ids)))


def test_where_the_completion_was_cut_no_token_is_at_fault(tokenizer):
    ids = encode(tokenizer, TEXT[: TEXT.index('"Köln"')])
    (error,) = score_tokens(tokenizer, ids, [GOLD], TOOLS).errors
    assert (error.code, error.tokens) == ("format.unparseable", (len(ids), len(ids)))


def test_an_exact_completion_has_no_errors(tokenizer):
    score = score_tokens(tokenizer, encode(tokenizer, TEXT + "<|im_end|>"), [GOLD], TOOLS)
    assert (score.score, score.valid, score.errors) == (1.0, True, [])
