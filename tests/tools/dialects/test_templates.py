"""Every chat template that TRL brings along: what it writes of a call is read back, or stands here as lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from ttpa.data.render import render_messages
from ttpa.errors import InputError
from ttpa.tools.call import Call
from ttpa.tools.completion import read_completion
from ttpa.tools.dialects.detect import call_style, dialect_of

trl = pytest.importorskip("trl")
TEMPLATES = {path.stem: path.read_text() for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")}

# By name; the one that TRL made of it for training, NAME_training, is as the original.
READ = {
    "hermes": ["qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"],
    "llama3_json": ["llama3_1", "llama3_2"],
    "pythonic": ["lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"],
    "qwen3_coder": [
        *("qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8"),
        *("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning"),
    ],
    "response_template": ["gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "glm4moe", "gptoss"],
}
DIALECT = {name: dialect for dialect, names in READ.items() for name in names}
# Written, but neither a dialect nor a response template of TRL reads it.
UNREAD = ["deepseekv3", "diffusion_gemma", "muse_glimmer"]
# Nothing of a call is written; deepseek_r1_distill writes one only where the content is null.
DROPS_CALLS = [
    *("cohere", "cohere2", "deepseek_r1_distill", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5_vl"),
]
# They want the content as a list of parts.
FAILS = ["idefics3", "llava_next", "smolvlm"]
ONE_CALL = ["gptoss", "llama3_1", "llama3_2"]
TEXT_ARGUMENTS = ["deepseekv3"]  # the training template wants objects, as all others do
NO_TEXT_BESIDE_CALLS = ["llama3_1", "llama3_2", "muse_glimmer"]
END_OF_TURN = {
    "llama3": "<|eot_id|>",
    "gemma4": "<turn|>",
    "gptoss": "<|call|>",
    "glm4moe": "<|observation|>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
}

NULL_IS_NONE = {"null": "null is written as None, which is no JSON", "null inside": "as null"}
LOST = {
    "lfm2_2_5": {"single quote": "strings are not escaped", "backslash": "strings are not escaped"},
    "lfm2_2_5_v2": {"single quote": "strings are not escaped", "backslash": "strings are not escaped"},
    "glm4moe": {"space around": "the response template strips text", "lines": "the response template strips text"},
    **dict.fromkeys(["gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4"], NULL_IS_NONE),
}

ARGUMENTS = {
    "plain": {"text": "Łódź ✈️ 東京", "more": "<b>a, b) & {c}</b>"},
    "double quote": {"text": 'say "hi"'},
    "single quote": {"text": "O'Neil"},
    "backslash": {"text": "C:\\new \\"},
    "lines": {"text": "one\n two\n"},
    "space around": {"text": " padded "},
    "text that looks like something else": {"text": "75001", "more": "true"},
    "objects": {
        "inner": {"list": [1, {"deep": "é x"}, []], "empty": {}, "yes": True},
        "list": [1, "two", [3.5, False]],
    },
    "quotes inside": {"inner": {"a": 'O\'Neil said "hi"\n\\'}},
    "numbers and words": {"number": -7, "fraction": 0.5, "large": 1e22, "small": 1e-7, "yes": True, "no": False},
    "null": {"nothing": None},
    "null inside": {"inner": {"a": None}, "list": [None]},
    "none": {},
}
TYPES = {
    **{"text": "string", "more": "string", "number": "integer", "fraction": "number", "large": "number"},
    **{"small": "number", "yes": "boolean", "no": "boolean", "nothing": "null", "inner": "object", "list": "array"},
}


def tool(name: str, types: dict[str, str]) -> dict:
    properties = {key: {"type": kind, "description": "A part."} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": parameters}}


TOOLS = [tool("do_this", TYPES), tool("do_that", {"number": "integer"})]


def base(name: str) -> str:
    return name.removesuffix("_training")


def with_template(tokenizer, name: str):
    end = next((end for start, end in END_OF_TURN.items() if name.startswith(start)), "<|im_end|>")
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=end, bos_token="<|bos|>")
    other.chat_template = TEMPLATES[name]
    return other


def message(*calls: Call, content: str = "") -> dict:
    records = [{"type": "function", "id": f"call0000{i}", "function": c.to_dict()} for i, c in enumerate(calls)]
    return {"role": "assistant", "content": content, "tool_calls": records}


def read_back(tokenizer, *calls: Call, content: str = ""):
    """The turn that is read from what the template writes, first to the end-of-turn token, then with all behind it."""
    user = {"role": "user", "content": "Go on."}
    (ids,) = render_messages(tokenizer, [user], [[message(*calls, content=content)]], tools=TOOLS).completions
    end = tokenizer.eos_token_id
    cut = ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids
    return [read_completion(tokenizer, part, TOOLS)[0] for part in (cut, ids)]


def is_exact(turn, calls) -> bool:
    if turn.errors or not all(call.complete and call.arguments is not None for call in turn.calls):
        return False
    for call in turn.calls:
        if call.inner_span is not None:  # read with positions
            top = {pointer: field for pointer, field in call.fields.items() if pointer.count("/") == 1}
            assert list(call.arguments.values()) == [field.value for field in top.values()]
            assert turn.text[slice(*call.name_span)].strip('"') == call.name
    return [Call(call.name, call.arguments).normal() for call in turn.calls] == [call.normal() for call in calls]


def test_every_template_of_trl_is_listed():
    listed = [*DIALECT, *UNREAD, *DROPS_CALLS, *FAILS]
    assert len(listed) == len(set(listed))
    assert sorted({base(name) for name in TEMPLATES}) == sorted(listed)


@pytest.mark.parametrize("name", sorted(name for name in TEMPLATES if base(name) in DIALECT))
def test_calls_are_read_back_as_they_were_written(tokenizer, name):
    other = with_template(tokenizer, name)
    assert dialect_of(other).name == DIALECT[base(name)]
    lost = set()
    for case, arguments in ARGUMENTS.items():
        call = Call("do_this", arguments)
        if not all(is_exact(turn, [call]) for turn in read_back(other, call)):
            lost.add(case)
    assert lost == set(LOST.get(base(name), ()))


@pytest.mark.parametrize("name", sorted(name for name in TEMPLATES if base(name) in DIALECT))
def test_two_calls_and_text_are_read_back_or_refused(tokenizer, name):
    other = with_template(tokenizer, name)
    calls = [Call("do_this", {"text": "a"}), Call("do_that", {"number": 1})]
    assert call_style(other).several == (base(name) not in ONE_CALL)
    assert call_style(other).beside_text == (base(name) not in NO_TEXT_BESIDE_CALLS)
    if base(name) in ONE_CALL:
        with pytest.raises(InputError, match="more than one call"):
            read_back(other, *calls)
        del calls[1]
    for turn in read_back(other, *calls, content="" if base(name) in NO_TEXT_BESIDE_CALLS else "Let me see."):
        assert is_exact(turn, calls)
        assert base(name) in (*NO_TEXT_BESIDE_CALLS, "gptoss") or "Let me see." in turn.content


@pytest.mark.parametrize("name", sorted(name for name in TEMPLATES if base(name) not in DIALECT))
def test_templates_whose_calls_cannot_be_read(tokenizer, name):
    other = with_template(tokenizer, name)
    with pytest.raises(InputError, match=r"drops tool calls" if base(name) in DROPS_CALLS else "in no known way"):
        dialect_of(other)
    call = message(Call("do_this", {"text": "Łódź"}))
    if base(name) in UNREAD:
        text = other.decode(
            render_messages(other, [{"role": "user", "content": "x"}], [[call]], tools=TOOLS).completions[0]
        )
        assert "do_this" in text and "Łódź" in text
    else:
        with pytest.raises(
            InputError, match="drops tool calls" if base(name) in DROPS_CALLS else "refuses the messages"
        ):
            render_messages(other, [{"role": "user", "content": "x"}], [[call]], tools=TOOLS)


@pytest.mark.parametrize("name", sorted(name for name in TEMPLATES if base(name) not in [*DROPS_CALLS, *FAILS]))
def test_which_form_of_arguments_a_template_wants(tokenizer, name):
    style = call_style(with_template(tokenizer, name))
    assert style.objects == (name not in TEXT_ARGUMENTS)
    assert style.texts == (base(name) in ("qwen3", "qwen3_instruct_2507", "qwen3_vl") or name in TEXT_ARGUMENTS)
