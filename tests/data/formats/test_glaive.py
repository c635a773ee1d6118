from __future__ import annotations

import json

import pytest

from ttpa.data.messages import calls_of
from ttpa.data.read import read_dialogues
from ttpa.errors import InputError

TOOLS = [
    {
        "name": "search",
        "description": "Search {anything}.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
    {"name": "now", "description": "The time."},
]
SYSTEM = (
    "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
    + "\n\n".join(json.dumps(tool, indent=4) for tool in TOOLS)
    + "\n"
)
CHAT = (
    'USER: Who said "it\'s"?\n\n\n'
    'ASSISTANT: Let me see. <functioncall> {"name": "search", "arguments": \'{"query": "it\'s {here}\\nA: b"}\'} '
    "<|endoftext|>\n\n\n"
    'FUNCTION RESPONSE: {"who": "Ann"}\n\n\n'
    "ASSISTANT: Ann did:\n\n1. it's\nA: that's\n\nA: all <|endoftext|>\n\n\n"
    "USER: And when?\n\n\n"
    'A: <functioncall> {"name": "now", "arguments": "{}"} <functioncall> {"name": "now", "arguments": {}} '
    "<|endoftext|>\n\n\n"
)


def read(tmp_path, *rows):
    (tmp_path / "a.json").write_text(json.dumps(rows))
    return read_dialogues(tmp_path / "a.json")


def test_a_chat_as_one_text_with_single_quoted_arguments(tmp_path):
    (dialogue,), report = read(tmp_path, {"system": SYSTEM, "chat": CHAT})
    assert [(message["role"], message["content"]) for message in dialogue.messages] == [
        ("user", 'Who said "it\'s"?'),
        ("assistant", "Let me see."),
        ("tool", '{"who": "Ann"}'),
        ("assistant", "Ann did:\n\n1. it's\nA: that's\n\nA: all"),
        ("user", "And when?"),
        ("assistant", ""),
    ]
    assert calls_of(dialogue.messages) == [
        {"name": "search", "arguments": {"query": "it's {here}\nA: b"}},
        {"name": "now", "arguments": {}},
        {"name": "now", "arguments": {}},
    ]
    assert [tool["function"] for tool in dialogue.tools] == TOOLS
    assert (report.format, report.repaired, len(report.notes)) == ("glaive", [], 1)


def test_a_chat_without_functions_keeps_its_system_text(tmp_path):
    system = "SYSTEM: You are a helpful assistant, with no access to external functions.\n"
    (dialogue,), report = read(tmp_path, {"system": system, "chat": "USER: Hi\n\n\nASSISTANT: Hello <|endoftext|>"})
    assert dialogue.tools == [] and report.notes == []
    assert dialogue.messages == [
        {"role": "system", "content": "You are a helpful assistant, with no access to external functions."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chat": "USER: x\n\n\nASSISTANT: <functioncall> {'name': 'now'"}, "a call cannot be read"),
        ({"chat": 'USER: x\nASSISTANT: <functioncall> {"name": "now", "arguments": \'{a}\'}'}, "a call cannot be read"),
        ({"chat": 'USER: x\nASSISTANT: <functioncall> {"name": "f", "arguments": \'{}\'}'}, "a call names no tool"),
        ({"chat": 'USER: x ASSISTANT: <functioncall> {"name": "now"}'}, "turns cannot be told apart"),
        ({"system": SYSTEM + "and more"}, "a tool cannot be read"),
        ({"system": SYSTEM[:-4]}, "a tool cannot be read"),
        ({"system": SYSTEM + json.dumps(TOOLS[0])}, "a tool has no valid schema"),
    ],
)
def test_rows_that_cannot_be_used_are_listed_and_dropped(tmp_path, change, reason):
    good = {"system": SYSTEM, "chat": CHAT}
    dialogues, report = read(tmp_path, good, {**good, **change})
    assert len(dialogues) == 1
    assert [entry["reason"] for entry in report.dropped] == [reason]


def test_columns_that_are_not_used_and_columns_that_are_missing(tmp_path):
    row = {"system": SYSTEM, "chat": CHAT}
    assert read(tmp_path, {**row, "score": 1})[1].notes[0] == "column 'score' is not used"
    with pytest.raises(InputError, match=r"a\.json:1: system and chat must be text"):
        read(tmp_path, row, {"system": SYSTEM})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat": "Hello"}, "the chat must begin with USER:"),
        ({"chat": "Hello\nUSER: x"}, "the chat must begin with USER:"),
        ({"system": ["x"]}, "system and chat must be text"),
        ({"chat": "A: x"}, "the chat must begin with USER:"),
    ],
)
def test_rows_of_another_shape_are_errors(tmp_path, change, message):
    with pytest.raises(InputError, match=rf"a\.json:1: {message}"):
        read(tmp_path, {"system": SYSTEM, "chat": CHAT, **change})
