from __future__ import annotations

import json

import pytest

from ttpa.data.dialogues import Dialogue, write_dialogues
from ttpa.data.read import read_dialogues
from ttpa.errors import InputError
from ttpa.tools.call import Call, message_with_calls

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def dialogue(id: str = "d1") -> Dialogue:
    messages = [
        {"role": "user", "content": "Rain in Łódź?"},
        message_with_calls([Call("weather", {"city": "Łódź"})]),
        {"role": "tool", "content": "2 mm"},
        {"role": "assistant", "content": "Yes."},
    ]
    return Dialogue(id, [TOOL], messages, {"seed": 1})


def record(**changes) -> dict:
    return {**dialogue().to_dict(), **changes}


def assistant(function) -> list[dict]:
    return [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [function]}]


def test_arguments_are_text_on_disk_and_dicts_in_memory(tmp_path):
    file = tmp_path / "dialogues.jsonl"
    write_dialogues(file, [dialogue(), dialogue("d2")])
    stored = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    assert stored["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Łódź"}'
    assert read_dialogues(file)[0] == [dialogue(), dialogue("d2")]


def test_dict_arguments_and_no_source_read_as_well(tmp_path):
    stored = record(messages=assistant({"name": "weather", "arguments": {"city": "x"}}))
    del stored["source"]
    (tmp_path / "a.jsonl").write_text(json.dumps(stored))
    (read,), _ = read_dialogues(tmp_path / "a.jsonl")
    assert read.messages[1]["tool_calls"] == [{"name": "weather", "arguments": {"city": "x"}}]
    assert read.source == {"format": "chat", "file": "a.jsonl", "line": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ["d2"]}, "the id must be text"),
        ({"tools": [{"function": {}}]}, "name"),
        ({"messages": []}, "messages must be a non-empty list"),
        ({"messages": [{"role": "robot", "content": ""}]}, "message 0: the role must be one of"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content must be text"),
        (
            {"messages": [{"role": "user", "content": "", "tool_calls": [{}]}]},
            "tool_calls must be a list, in a message",
        ),
        ({"messages": assistant({"function": {"arguments": "{}"}})}, "a tool call has no name"),
        ({"messages": assistant("weather()")}, "a tool call has no name"),
        ({"messages": assistant({"function": {"name": "wether", "arguments": "{}"}})}, "names no tool.*weather"),
        (
            {"messages": assistant({"function": {"name": "weather", "arguments": "{city"}})},
            "no JSON from character 1 on",
        ),
        ({"messages": assistant({"function": {"name": "weather", "arguments": "[1]"}})}, "must be an object"),
        ({"messages": assistant({"function": {"name": "weather", "arguments": [1]}})}, "must be an object"),
    ],
)
def test_bad_dialogues_are_named_by_line(tmp_path, change, message):
    file = tmp_path / "dialogues.jsonl"
    second = record(**{"id": "d2", **change})
    file.write_text(json.dumps(record()) + "\n\n" + json.dumps(second))
    with pytest.raises(InputError, match=f"dialogues.jsonl:3: .*{message}"):
        read_dialogues(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [("tool", "unknown column 'tool': did you mean 'tools'"), ("offer", "calls 'weather', which names no tool")],
)
def test_tools_in_a_column_of_another_name(tmp_path, name, message):
    stored = record()
    stored[name] = stored.pop("tools")
    (tmp_path / "a.jsonl").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=f"a.jsonl:1: .*{message}"):
        read_dialogues(tmp_path / "a.jsonl")


def test_an_id_comes_once(tmp_path):
    write_dialogues(tmp_path / "a.jsonl", [dialogue(), dialogue()])
    with pytest.raises(InputError, match=r"a\.jsonl:2: the id 'd1' is already on line 1"):
        read_dialogues(tmp_path / "a.jsonl")


def test_empty_and_missing_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(InputError, match="the file is empty"):
        read_dialogues(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="no such file"):
        read_dialogues(tmp_path / "b.jsonl")
