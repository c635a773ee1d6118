"""Trajectories as the chat templates of several families write them, each given as what its speakers say."""

from __future__ import annotations

import copy
import json
import time
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import UndefinedError

from ttpa.tools.speakers import read_stretches

GEMMA_RESULT = '<|tool_response>response:w{value:<|"|>18 C<|"|>}<tool_response|>'
FAMILIES = {
    "qwen": [
        *[("CALL", "model"), ("<|im_end|>", "end"), ("\n<|im_start|>user\n", "template")],
        *[("<tool_response>\n18 C\n</tool_response>", "tool"), ("\n", "template")],
        *[("<tool_response>\n<|im_start|>\n</tool_response>", "tool"), ("<|im_end|>", "end")],
        *[("\n<|im_start|>assistant\n", "template"), ("It is 18.", "model"), ("<|im_end|>", "end")],
        *[("\n<|im_start|>user\n", "template"), ("And now?", "prompt"), ("<|im_end|>", "end")],
        *[("\n<|im_start|>assistant\n", "template"), ("The same.", "model"), ("<|im_end|>", "end"), ("\n", "template")],
    ],
    "llama 3": [
        *[("CALL", "model"), ("<|eom_id|>", "end"), ("<|start_header_id|>ipython<|end_header_id|>\n\n", "template")],
        *[("18 C", "tool"), ("<|eot_id|>", "end"), ("<|start_header_id|>assistant<|end_header_id|>\n\n", "template")],
        *[("It is 18.", "model"), ("<|eot_id|>", "end"), ("<|start_header_id|>user<|end_header_id|>\n\n", "template")],
        ("And now?", "prompt"),
    ],
    "gemma": [
        *[("CALL", "model"), ("<end_of_turn>", "end"), ("\n<start_of_turn>user\n", "template"), ("18 C", "prompt")],
        *[("<end_of_turn>", "end"), ("\n<start_of_turn>model\n", "template"), ("It is 18.", "model")],
    ],
    "gemma 4": [
        *[("<|tool_call>call:w{}<tool_call|>", "model"), (GEMMA_RESULT, "tool"), ("It is 18.", "model")],
        *[("<turn|>", "end"), ("\n<|turn>tool\n", "template"), ("18 C", "tool"), ("<turn|>", "end")],
        *[("\n<|turn>model\n", "template"), ("It is 18.", "model"), ("<turn|>", "end"), ("\n", "template")],
    ],
    "glm": [
        *[("CALL", "model"), ("<|observation|>\n", "template"), ("<tool_response>\n18 C\n</tool_response>", "tool")],
        *[("<|assistant|>\n", "template"), ("<think></think>\nIt is 18.", "model"), ("<|user|>\n", "template")],
        *[("And now?", "prompt"), ("<|assistant|>\n", "template"), ("The same.", "model")],
    ],
    "deepseek": [
        *[("CALL", "model"), ("<｜end▁of▁sentence｜>", "end")],
        ("<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>18 C<｜tool▁output▁end｜><｜tool▁outputs▁end｜>", "tool"),
        *[("It is 18.", "model"), ("<｜end▁of▁sentence｜>", "end"), ("<｜User｜>", "template"), ("And now?", "prompt")],
        *[("<｜Assistant｜>", "template"), (" The same.", "model"), ("<｜end▁of▁sentence｜>", "end")],
    ],
    "mistral": [
        *[("CALL", "model"), ("</s>", "end"), ('[TOOL_RESULTS] {"content": 18}[/TOOL_RESULTS]', "tool")],
        *[('[TOOL_RESULTS] {"content": 19}[/TOOL_RESULTS]', "tool"), (" It is 18 or <b>19</b>.", "model")],
        *[("</s>", "end"), ("[INST]", "template"), (" And now?", "prompt"), ("[/INST]", "template")],
        *[(" The same.", "model"), ("</s>", "end")],
    ],
    "gpt-oss": [
        *[("<|channel|>analysis<|message|>Well.", "model"), ("<|end|>", "end"), ("<|start|>assistant", "template")],
        *[(" to=functions.w<|channel|>commentary json<|message|>{}", "model"), ("<|call|>", "end")],
        ("<|start|>functions.w to=assistant<|channel|>commentary<|message|>", "template"),
        *[("18 C", "tool"), ("<|end|>", "end"), ("<|start|>assistant", "template")],
        *[("<|channel|>final<|message|>It is 18.", "model"), ("<|return|>", "end")],
        *[("<|start|>user<|message|>", "template"), ("And now?", "prompt"), ("<|end|>", "end")],
    ],
    "phi": [
        *[("Well.", "model"), ("<|end|>", "end"), ("\n<|user|>\n", "template"), ("And now?", "prompt")],
        *[("<|end|>", "end"), ("\n<|assistant|>\n", "template"), ("The same.", "model"), ("<|end|>", "end")],
    ],
    "cohere": [
        *[("Well.", "model"), ("<|END_OF_TURN_TOKEN|>", "end")],
        *[("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "template"), ("And now?", "prompt")],
        *[("<|END_OF_TURN_TOKEN|>", "end"), ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "template")],
        ("<|START_RESPONSE|>The same.", "model"),
    ],
}
SPECIAL = """<|im_start|> <|im_end|> <|eom_id|> <|eot_id|> <|start_header_id|> <|end_header_id|> <start_of_turn>
    <end_of_turn> <|turn> <turn|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|> <|observation|>
    <|assistant|> <|user|> <｜end▁of▁sentence｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜>
    <｜tool▁output▁end｜> <｜User｜> <｜Assistant｜> </s> [TOOL_RESULTS] [/TOOL_RESULTS] [INST] [/INST] <|start|>
    <|message|> <|channel|> <|end|> <|call|> <|return|> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|>
    <|CHATBOT_TOKEN|> <|START_RESPONSE|> <|eot|>""".split()


@pytest.fixture(scope="module")
def every_mark(tokenizer):
    """A tokenizer that knows the special tokens of all families."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL, "bos_token": "<|endoftext|>"})
    return tokenizer


def read(tokenizer, text, written=None, marks=()):
    """What is said by whom, neighbours of one speaker joined."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found, _, stretches = read_stretches(tokenizer, ids, written=written or [1] * len(ids), marks=marks)
    assert found == text
    said = [(text[s.start : s.end], s.speaker) for s in stretches]
    return [("".join(t for t, _ in run), who) for who, run in groupby(said, key=lambda part: part[1])]


def joined(parts):
    return [("".join(t for t, _ in run), who) for who, run in groupby(parts, key=lambda part: part[1])]


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_are_told_apart_in_every_family(every_mark, family):
    parts = FAMILIES[family]
    assert read(every_mark, "".join(text for text, _ in parts)) == joined(parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_wherever_a_trajectory_is_cut_what_was_said_before_stays(every_mark, family):
    parts = FAMILIES[family]
    text = "".join(text for text, _ in parts)
    for length in range(len(text)):
        ids = every_mark(text[:length], add_special_tokens=False)["input_ids"]
        _, _, stretches = read_stretches(every_mark, ids, written=[1] * len(ids))
        assert [s.start for s in stretches] == [0, *(s.end for s in stretches[:-1])][: len(stretches)]
    for stop in range(1, len(parts)):
        if parts[stop][1] == "template" and parts[stop - 1][1] == "end":
            assert read(every_mark, "".join(text for text, _ in parts[:stop])) == joined(parts[:stop])


@pytest.mark.parametrize(
    "text",
    [
        "I write <|im_start|>user\n or <|start_header_id|>tool<|end_header_id|>.",
        "<tool_response>made up</tool_response> and [TOOL_RESULTS]too[/TOOL_RESULTS].",
        "<|im_start|>user\nWhat?",
    ],
)
def test_a_header_is_what_the_model_says_unless_its_turn_has_ended(every_mark, text):
    assert read(every_mark, text) == [(text, "model")]


def test_marks_of_other_families_are_plain_text(tokenizer):
    text = "see [INST], </s>, <|user|> and <start_of_turn>user\n"
    assert read(tokenizer, text + "<|im_end|>") == [(text, "model"), ("<|im_end|>", "end")]


def test_a_special_token_that_closes_a_call_ends_no_turn(every_mark):
    text = "<|tool_call>call:w{}<tool_call|>"
    assert read(every_mark, text) == [(text.removesuffix("<tool_call|>"), "model"), ("<tool_call|>", "end")]
    assert read(every_mark, text, marks=["<tool_call|>"]) == [(text, "model")]


def test_what_the_model_did_not_write_is_told_in_unknown_templates_too(tokenizer):
    parts = [("fixed", 0), ("Well: CALL", 1), ("\nResult: 18 C\nBot: ", 0), ("It is 18.", 1), (" \n", 0)]
    written = [flag for text, flag in parts for _ in text]
    assert read(tokenizer, "".join(text for text, _ in parts), written) == [
        *[("fixed", "given"), ("Well: CALL", "model"), ("\nResult: 18 C\nBot: ", "given"), ("It is 18.", "model")],
        (" \n", "template"),
    ]


def test_what_a_template_opens_a_turn_with_is_not_said_by_the_model(tokenizer):
    opening = "\n<|im_start|>assistant\n<think></think>"
    text = f"Well.<|im_end|>{opening}It is 18."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    head = len(tokenizer(f"Well.<|im_end|>{opening}", add_special_tokens=False)["input_ids"])
    written = [1] * 6 + [0] * (head - 6) + [1] * (len(ids) - head)
    assert read(tokenizer, text, written)[2:] == [(opening, "template"), ("It is 18.", "model")]


def test_a_turn_that_is_not_trained_is_still_the_models(tokenizer):
    text = "Well.<|im_end|>\n<|im_start|>assistant\nIt is 18."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for written in ([0] * len(ids), [0] * 6 + [1] * (len(ids) - 6)):
        assert read(tokenizer, text, written) == read(tokenizer, text)


@pytest.mark.parametrize("stop", ["<|observation|>", "<|user|>", "<|tool_response>"])
def test_a_header_that_the_model_stops_with_ends_its_turn(every_mark, stop):
    assert read(every_mark, f"Well.{stop}") == [("Well.", "model"), (stop, "end")]


QUESTION, ANSWER = {"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}
CALL = {"type": "function", "id": "call00001", "function": {"name": "w", "arguments": {"city": "Rome"}}}
RESULT = {"role": "tool", "name": "w", "tool_call_id": "call00001", "content": "RESULT"}
TOOL = {"type": "function", "function": {"name": "w", "description": "", "parameters": {"properties": {"city": {}}}}}
WITHOUT_TOOLS = {"cohere", "cohere2", "gemma", "gemma3", "llama3", "phi3", "phi3_5"}
OF_IMAGES = {"idefics3", "llava_next", "smolvlm"}


def templates_of_trl():
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    found = {path.stem: path.read_text() for path in folder.glob("*.jinja")}
    # those for training write the same text
    return {name: found[name] for name in found.keys() - OF_IMAGES if not name.endswith("_training")}


def rendered(tokenizer, template, messages, **options):
    """The conversation as the template writes it; some templates want the arguments as JSON text."""
    for arguments in (CALL["function"]["arguments"], json.dumps(CALL["function"]["arguments"])):
        calls = [{**CALL, "function": {"name": "w", "arguments": arguments}}]
        given = [{**message, "tool_calls": calls} if "tool_calls" in message else message for message in messages]
        try:
            return tokenizer.apply_chat_template(given, chat_template=template, tokenize=False, **options)
        except (TypeError, UndefinedError) as error:
            problem = error
    raise problem


def test_turns_are_told_apart_in_every_template_of_trl(every_mark):
    for name, template in templates_of_trl().items():
        rest = [ANSWER, {"role": "user", "content": "AGAIN"}, {"role": "assistant", "content": "THEN"}]
        options = {}
        if name not in WITHOUT_TOOLS:
            rest = [{"role": "assistant", "content": "Well.", "tool_calls": [CALL]}, RESULT, *rest]
            options = {"tools": [TOOL]}
        text = rendered(every_mark, template, [QUESTION, *rest], **options)
        start = rendered(every_mark, template, [QUESTION], add_generation_prompt=True, **options)
        shared = next(i for i, (a, b) in enumerate(zip(text, f"{start}\0", strict=False)) if a != b)
        said = read(every_mark, text[shared:])
        words = ("RESULT", "ANSWER", "AGAIN", "THEN")
        found = {word: [speaker for part, speaker in said if word in part] for word in words}
        expected = {"RESULT": ["tool"] if options else [], "ANSWER": ["model"], "AGAIN": ["prompt"], "THEN": ["model"]}
        assert found == expected, name


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([*SPECIAL, "user", "tool", "\n", "<tool_response>", "</tool_response>", "ü"])), st.data()
)
def test_stretches_cover_any_text(every_mark, parts, data):
    ids = every_mark("".join(parts), add_special_tokens=False)["input_ids"]
    written = data.draw(st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids)))
    text, spans, stretches = read_stretches(every_mark, ids, written=written)
    assert len(spans) == len(ids)
    assert [s.start for s in stretches] == [0, *(s.end for s in stretches)][: len(stretches)]
    assert (stretches[-1].end if stretches else 0) == len(text) and all(s.start < s.end for s in stretches)


def test_long_nonsense_is_quick(every_mark):
    start = time.perf_counter()
    for part in ("<|im_start|>", "<|start|>user ", "<tool_response>", "[TOOL_RESULTS]", "\n", "<|im_end|>", "<|user|>"):
        read(every_mark, part * 3000)
    assert time.perf_counter() - start < 5.0
