from __future__ import annotations

import json

import pytest

from ttpa.data.messages import calls_of
from ttpa.data.read import read_dialogues
from ttpa.errors import InputError

TOOLS = [
    {
        "name": "Market Trends API",
        "description": "Trends.",
        "parameters": {
            "type": "dict",
            "properties": {"kind": {"type": "string"}, "days": {"type": "int"}, "full": {"type": "bool"}},
            "required": ["kind"],
        },
        "required": None,
    },
    {"name": "SEC Filings/v2", "description": "Filings.", "parameters": {"type": "dict", "properties": {}}},
]
SYSTEM = (
    "You are an expert in composing functions.\nIf no function fits, say so.\n"
    "Here is a list of functions in JSON format that you can invoke:\n"
    f"{json.dumps(TOOLS)}. \nShould you decide to return the function call(s).\n"
    "Put it in the format of [func1(params_name=params_value), func2(params)]\n\nNO other text MUST be included. \n"
)
ANSWER = """[Market Trends API(kind="it's, [new]", days=-3, full=True), SEC Filings/v2()]"""


def row(answer: str = ANSWER) -> dict:
    turns = [
        ("user", "Trends?"),
        ("assistant", answer),
        ("tool", '[{"name": "Market Trends API", "results": {}}]'),
        ("assistant", "Up (by 3), see [1]."),
    ]
    return {"system": SYSTEM, "conversations": [{"from": who, "value": text} for who, text in turns]}


def test_pythonic_calls_of_tools_with_spaces_in_their_names(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([row()]))
    (dialogue,), report = read_dialogues(tmp_path / "a.json")
    assert [message["role"] for message in dialogue.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert dialogue.messages[0]["content"] == "You are an expert in composing functions.\nIf no function fits, say so."
    assert calls_of(dialogue.messages) == [
        {"name": "Market Trends API", "arguments": {"kind": "it's, [new]", "days": -3, "full": True}},
        {"name": "SEC Filings/v2", "arguments": {}},
    ]
    assert dialogue.messages[4]["content"] == "Up (by 3), see [1]."
    assert dialogue.tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"kind": {"type": "string"}, "days": {"type": "integer"}, "full": {"type": "boolean"}},
        "required": ["kind"],
    }
    assert (report.format, dialogue.id) == ("toolace", "a:1")
    assert report.to_dict()["repaired_by_kind"] == {
        "type words read as JSON Schema": 1,
        "null keywords of a schema left out": 1,
    }


def test_how_a_call_is_not_as_python_writes_it_is_listed(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row("[Market Trends API(kind='x', full=true)]")))
    (dialogue,), report = read_dialogues(tmp_path / "a.jsonl")
    assert calls_of(dialogue.messages)[0]["arguments"] == {"kind": "x", "full": True}
    assert [entry["detail"] for entry in report.repaired][2:] == ["true"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ('[Market Trends API("x")]', "a call cannot be read"),
        ('[Market Trends API(kind="x", days=)]', "a call cannot be read"),
        ('[Market Trends API(kind="x"', "a call cannot be read"),
        ('[Market Trend(kind="x")]', "a call names no tool"),
    ],
)
def test_rows_that_cannot_be_used_are_listed_and_dropped(tmp_path, answer, reason):
    (tmp_path / "a.jsonl").write_text(json.dumps(row()) + "\n" + json.dumps(row(answer)))
    dialogues, report = read_dialogues(tmp_path / "a.jsonl")
    assert len(dialogues) == 1
    assert [(entry["where"], entry["reason"]) for entry in report.dropped] == [(f"{tmp_path}/a.jsonl:2", reason)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": "Be brief."}, "the system text lists no tools"),
        ({"system": None}, "the system text lists no tools"),
        ({"conversations": None}, "conversations must be a non-empty list"),
        ({"conversations": []}, "conversations must be a non-empty list"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "turn 0: from must be one of"),
        ({"conversations": [{"from": "user", "value": None}]}, "turn 0 must be an object with from and value"),
    ],
)
def test_rows_of_another_shape_are_errors(tmp_path, change, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row()) + "\n" + json.dumps({**row(), **change}))
    with pytest.raises(InputError, match=f"a.jsonl:2: {message}"):
        read_dialogues(tmp_path / "a.jsonl")
