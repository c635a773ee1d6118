from __future__ import annotations

import json

import pytest

from ttpa.data.read import kind_of, read_dialogues
from ttpa.errors import InputError

FUNCTION = {
    "name": "weather",
    "description": "Weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
USER = {"role": "user", "content": "Rain in Łódź and Kraków?"}


def call(id: str, city: str) -> dict:
    return {"id": id, "type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}


def read(tmp_path, row, name="a.jsonl"):
    (tmp_path / name).write_text(json.dumps(row))
    dialogues, report = read_dialogues(tmp_path / name)
    return dialogues[0], report.to_dict()


def test_an_openai_chat_with_two_calls_in_a_turn(tmp_path):
    messages = [
        {"role": "developer", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call("a", "Łódź"), call("b", "Kraków")]},
        {"role": "tool", "tool_call_id": "a", "content": "2 mm"},
        {"role": "tool", "tool_call_id": "b", "content": "0 mm"},
        {"role": "assistant", "content": "Only in Łódź."},
    ]
    dialogue, report = read(tmp_path, {"messages": messages, "tools": TOOLS, "score": 1})
    assert dialogue.id == "a:1" and dialogue.tools == TOOLS
    assert dialogue.source == {"format": "chat", "file": "a.jsonl", "line": 1}
    assert dialogue.messages[0] == messages[0] and dialogue.messages[3:] == messages[3:]
    assert dialogue.messages[2] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Łódź"}}},
            {"id": "b", "type": "function", "function": {"name": "weather", "arguments": {"city": "Kraków"}}},
        ],
    }
    assert report["repaired"] == [] and report["notes"] == ["column 'score' is not used"]


def test_legacy_functions_and_content_parts_are_read_and_listed(tmp_path):
    parts = [{"type": "text", "text": "Rain in"}, {"type": "text", "text": "Łódź?"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Łódź"}'}},
        {"role": "function", "name": "weather", "content": "2 mm"},
    ]
    dialogue, report = read(tmp_path, {"id": 7, "messages": messages, "functions": [FUNCTION]})
    assert dialogue.id == "7" and dialogue.tools == TOOLS
    assert dialogue.messages == [
        {"role": "user", "content": "Rain in\nŁódź?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Łódź"}}}],
        },
        {"role": "tool", "content": "2 mm", "name": "weather"},
    ]
    assert [(entry["repair"], entry["detail"]) for entry in report["repaired"]] == [
        ("parts of a content joined", "messages message 0"),
        ("function_call read as tool_calls", "messages message 1"),
        ("role function read as tool", "messages message 2"),
    ]


def test_a_row_of_when2call_with_its_calls_and_types_as_text(tmp_path):
    tool = {
        "name": "weather",
        "parameters": {"type": "dict", "properties": {"city": {"type": "str"}}},
        "required": ["city"],
    }
    answer = '<TOOLCALL>[{"name": "weather", "arguments": {"city": "Łódź"}}]</TOOLCALL>'
    row = {"tools": [json.dumps(tool)], "messages": [USER, {"role": "assistant", "content": answer}]}
    dialogue, report = read(tmp_path, row)
    assert dialogue.messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Łódź"}}
    assert dialogue.messages[1]["content"] == ""
    assert dialogue.tools[0]["function"]["parameters"] == FUNCTION["parameters"]
    assert report["repaired_by_kind"] == {
        "type words read as JSON Schema": 1,
        "required moved to where JSON Schema has it": 1,
        "<TOOLCALL> in a content read as calls": 1,
    }
    rows = [row]
    for text in ('[{"name": "weather"', '[{"name": "wether", "arguments": {}}]'):
        content = f"<TOOLCALL>{text}</TOOLCALL>"
        rows.append({**row, "messages": [USER, {"role": "assistant", "content": content}]})
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dialogues, found = read_dialogues(tmp_path / "b.jsonl")
    assert len(dialogues) == 1
    assert [(entry["id"], entry["reason"]) for entry in found.dropped] == [
        ("b:2", "a call cannot be read"),
        ("b:3", "a call names no tool"),
    ]


def test_a_dialogue_without_calls_and_one_without_arguments(tmp_path):
    dialogue, report = read(tmp_path, {"messages": [USER, {"role": "assistant", "content": "I cannot know."}]})
    assert (dialogue.tools, report["repaired"]) == ([], [])
    bare = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": ""}}]}
    dialogue, report = read(tmp_path, {"messages": [USER, bare], "tools": [{"name": "now"}]})
    assert dialogue.messages[1]["tool_calls"][0]["function"]["arguments"] == {}
    assert report["repaired_by_kind"] == {"missing arguments read as none": 1}


def test_null_arguments_that_arrow_made_are_left_out(tmp_path):
    from datasets import Dataset

    calls = [{"name": "f", "arguments": {"a": 1, "b": None}}, {"name": "f", "arguments": {"a": None, "b": [{"c": 1}]}}]
    tools = [{"name": "f", "parameters": {"properties": {"a": {"type": "integer"}, "b": {"type": "array"}}}}]
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [c]}], "tools": tools} for c in calls
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    dialogues, report = read_dialogues(tmp_path / "a.parquet")
    found = [dialogue.messages[1]["tool_calls"][0]["arguments"] for dialogue in dialogues]
    assert found == [{"a": 1}, {"b": [{"c": 1}]}]
    assert [entry["repair"] for entry in report.repaired] == ["null arguments left out"] * 2


def test_nulls_that_arrow_puts_into_tools_are_left_out(tmp_path):
    """Arrow gives each tool the parameters of the other, and each parameter the keywords of all."""
    from datasets import Dataset

    listed = {"day": {"type": "string", "enum": ["Monday"], "default": "Monday"}}, {"town": {"type": "string"}}
    tools = [
        {"name": name, "parameters": {"type": "object", "properties": properties}}
        for name, properties in zip("fg", listed, strict=True)
    ]
    Dataset.from_list([{"messages": [USER], "tools": tools}]).to_parquet(tmp_path / "a.parquet")
    (dialogue,), report = read_dialogues(tmp_path / "a.parquet")
    assert [tool["function"] for tool in dialogue.tools] == tools
    assert report.to_dict()["repaired_by_kind"] == {"nulls that Arrow put into tools left out": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content must be text; a part of it is"),
        ({"messages": "x"}, "messages must be a non-empty list"),
        ({"messages": [USER, 3]}, "message 1: the role must be one of"),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "f"}, "tool_calls": [{"name": "f"}]}]},
            "message 0 has both function_call and tool_calls",
        ),
        (
            {"messages": [USER], "tools": [{"name": "f", "parameters": {"type": "array"}}]},
            'must have the type "object"',
        ),
        ({"messages": [USER], "tools": "[{"}, "tools is text but no JSON"),
    ],
)
def test_surprises_are_errors_with_file_and_line(tmp_path, row, message):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row))
    assert kind_of(file)[0] == "dialogues"
    with pytest.raises(InputError, match=f"a.jsonl:1: .*{message}"):
        read_dialogues(file)
