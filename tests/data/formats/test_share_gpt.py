from __future__ import annotations

import json

import pytest

from ttpa.data.messages import calls_of
from ttpa.data.read import read_dialogues
from ttpa.errors import InputError

TOOL = {
    "type": "function",
    "function": {
        "name": "group",
        "description": "Group devices.",
        "parameters": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "devices": {"type": "array", "items": {"type": "string"}}},
            "required": ["name"],
        },
    },
}
THINK = {
    "name": "think",
    "description": "",
    "parameters": {"type": "object", "properties": {"thought": {"type": "string"}}},
}
HERMES_SYSTEM = (
    "You are a function calling AI model, with function signatures within <tools> </tools> XML tags.\n"
    "<tools>\n{}\n</tools>\nFor each function call return a JSON object:\n<tool_call>\n{{tool_call}}\n</tool_call>"
)


def turns(*pairs: tuple[str, str]) -> list[dict]:
    return [{"from": who, "value": text} for who, text in pairs]


def read(tmp_path, *rows):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_dialogues(tmp_path / "a.jsonl")


def hermes(system: str, answer: str, **columns) -> dict:
    results = '<tool_response>\n{"ok": 1}\n</tool_response>\n<tool_response>\n"two"\n</tool_response>\n'
    talk = turns(("system", system), ("human", "Group it."), ("gpt", answer), ("tool", results), ("gpt", "Done."))
    return {"id": "h", "conversations": talk, **columns}


def test_hermes_with_python_dicts_in_its_calls_and_its_tool_list(tmp_path):
    answer = (
        "Both.\n<tool_call>\n{'arguments': {'name': \"Ann's\", 'devices': ['Nest', 'Hue']}, 'name': 'group'}\n"
        '</tool_call>\n<tool_call>\n{"name": "group", "arguments": {"name": "Main"}}\n</tool_call>\n'
    )
    (dialogue,), report = read(tmp_path, hermes(HERMES_SYSTEM.format([TOOL]), answer, category="IoT"))
    assert dialogue.id == "h" and dialogue.tools == [TOOL]
    assert [message["role"] for message in dialogue.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert calls_of(dialogue.messages) == [
        {"name": "group", "arguments": {"name": "Ann's", "devices": ["Nest", "Hue"]}},
        {"name": "group", "arguments": {"name": "Main"}},
    ]
    assert [message["content"] for message in dialogue.messages[1:]] == ["Both.", '{"ok": 1}', '"two"', "Done."]
    assert report.to_dict()["repaired_by_kind"] == {
        "tools in Python's quotes or words": 1,
        "Python's quotes or words instead of JSON's": 1,
    }
    assert report.notes == [
        "column 'category' is not used",
        "the system text that lists tools and how to write calls is left out: the chat template writes both",
    ]


def test_tools_one_a_line_and_tools_in_a_column(tmp_path):
    answer = '<tool_call>{"name": "group", "arguments": {"name": "x"}}</tool_call>'
    lines = HERMES_SYSTEM.format("\n".join(json.dumps(tool) for tool in (TOOL, THINK)))
    column = {**hermes(HERMES_SYSTEM.format("[]"), answer), "id": "c", "tools": json.dumps([TOOL])}
    dialogues, report = read(tmp_path, hermes(lines, answer), column)
    assert [len(dialogue.tools) for dialogue in dialogues] == [2, 1] and report.repaired == []


def test_a_row_of_json_mode_has_no_calls(tmp_path):
    talk = turns(("system", "Answer in JSON."), ("human", "x"), ("gpt", '{"name": "a", "arguments": {}}'))
    (dialogue,), report = read(tmp_path, {"conversations": talk, "tools": None})
    assert (dialogue.tools, calls_of(dialogue.messages), report.repaired) == ([], [], [])
    assert [message["role"] for message in dialogue.messages] == ["system", "user", "assistant"]


def test_function_call_and_observation_turns_of_apigen_mt(tmp_path):
    thought = json.dumps({"name": "think", "arguments": {"thought": 'First "this".'}})
    both = json.dumps([{"name": "group", "arguments": {"name": n}} for n in "ab"])
    talk = turns(
        ("human", "Group it."),
        ("function_call", thought),
        ("observation", ""),
        ("function_call", both),
        ("observation", '{"ok": true}'),
        ("gpt", "Done."),
    )
    row = {"system": "# Policy\nBe kind.", "conversations": talk, "tools": json.dumps([TOOL, THINK])}
    (dialogue,), report = read(tmp_path, row)
    assert dialogue.messages[0] == {"role": "system", "content": "# Policy\nBe kind."}
    assert [len(calls_of([message])) for message in dialogue.messages] == [0, 0, 1, 0, 2, 0, 0]
    assert calls_of(dialogue.messages)[0] == {"name": "think", "arguments": {"thought": 'First "this".'}}
    assert report.notes == [
        "calls of the tool 'think' are kept: their argument is free text, which no model says exactly"
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (hermes(HERMES_SYSTEM.format([TOOL]), '<tool_call>\n{"name": "group", "arg'), "a call cannot be read"),
        (hermes(HERMES_SYSTEM.format([TOOL]), '<tool_call>{"name": "group"}</tool_call>'), "a call cannot be read"),
        (hermes('<tools>[{"name": "f"</tools>', "x"), "a tool cannot be read"),
        (hermes('<tools>[{"name": "f"}] and others</tools>', "x"), "a tool cannot be read"),
        (hermes("<tools>[]</tools>", '<tool_call>{"name": "f", "arguments": {}}</tool_call>'), "a call names no tool"),
        (
            {"conversations": turns(("human", "x"), ("function_call", "group()")), "tools": [TOOL]},
            "a call cannot be read",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_listed_and_dropped(tmp_path, row, reason):
    dialogues, report = read(tmp_path, {"conversations": turns(("human", "x"), ("gpt", "y"))}, {**row, "id": "bad"})
    assert len(dialogues) == 1 and report.repaired == []
    assert [(entry["id"], entry["reason"]) for entry in report.dropped] == [("bad", reason)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"role": "user", "content": "x"}]}, "turn 0 must be an object with from and value"),
        ({"conversations": turns(("human", "x")), "system": ["x"]}, "system must be text"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "turn 0: from must be one of system, human"),
        ({"conversations": turns(("moderator", "x"))}, "turn 0: from must be one of system, human"),
        ({"conversations": turns(("human", "x")), "tools": "[{"}, "tools is text but no JSON"),
    ],
)
def test_rows_of_another_shape_are_errors(tmp_path, row, message):
    with pytest.raises(InputError, match=f"a.jsonl:1: {message}"):
        read(tmp_path, row)


def test_labelled_answers_are_no_dialogues(tmp_path):
    row = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "kto_tag": False}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=r"a\.jsonl:1: kto_tag says whether the answer is a good one"):
        read_dialogues(tmp_path / "a.jsonl")
