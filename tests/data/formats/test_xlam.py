from __future__ import annotations

import json

import pytest

from ttpa.data.read import read_dialogues
from ttpa.errors import InputError
from ttpa.tools.schema import functions

TOOLS = [
    {
        "name": "giveaways",
        "description": "Live giveaways of a type.",
        "parameters": {
            "type": {"description": "beta, game or loot.", "type": "str", "default": "game"},
            "limit": {"description": "How many.", "type": "int, optional"},
            "ids": {"description": "Which.", "type": "List[int]"},
        },
    }
]
ANSWERS = [
    {"name": "giveaways", "arguments": {"type": "beta", "ids": [1, 2]}},
    {"name": "giveaways", "arguments": {"type": "game", "ids": []}},
]


def row(**changes) -> dict:
    return {"id": 0, "query": "Which?", "tools": json.dumps(TOOLS), "answers": json.dumps(ANSWERS), **changes}


def test_a_query_and_the_calls_that_answer_it(tmp_path):
    file = tmp_path / "xlam.json"
    file.write_text(json.dumps([row(), row(id=1, tools=TOOLS, answers=ANSWERS), row(id=2, answers="[]")], indent=1))
    dialogues, report = read_dialogues(file)
    assert [dialogue.id for dialogue in dialogues] == ["0", "1", "2"] and report.format == "xlam"
    first, second, irrelevant = dialogues
    assert first.messages == [
        {"role": "user", "content": "Which?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": answer} for answer in ANSWERS],
        },
    ]
    assert second.messages == first.messages and second.tools == first.tools
    assert irrelevant.messages == first.messages[:1]
    assert functions(first.tools)["giveaways"]["parameters"] == {
        "type": "object",
        "properties": {
            "type": {"description": "beta, game or loot.", "type": "string", "default": "game"},
            "limit": {"description": "How many.", "type": "integer"},
            "ids": {"description": "Which.", "type": "array", "items": {"type": "integer"}},
        },
        "required": ["ids"],
    }
    assert first.source == {"format": "xlam", "file": "xlam.json", "line": 2}
    assert report.to_dict()["repaired_by_kind"] == {
        "flat parameters put into an object schema": 3,
        "type words read as JSON Schema": 3,
    }


def test_rows_that_cannot_be_used_are_listed_and_dropped(tmp_path):
    bad = [
        row(id=1, answers='[{"name": "giveaways"'),
        row(id=2, answers=[{"name": "giveaways"}]),
        row(id=3, answers=[{"name": "giveaway", "arguments": {}}]),
        row(id=4, tools=TOOLS * 2),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [row(), *bad])))
    dialogues, report = read_dialogues(tmp_path / "a.jsonl")
    assert [dialogue.id for dialogue in dialogues] == ["0"]
    assert [(entry["id"], entry["reason"]) for entry in report.dropped] == [
        ("1", "a call cannot be read"),
        ("2", "a call cannot be read"),
        ("3", "a call names no tool"),
        ("4", "a tool has no valid schema"),
    ]
    assert {entry["id"] for entry in report.repaired} == {"0"}


def test_nulls_that_arrow_puts_into_answers_are_left_out(tmp_path):
    from datasets import Dataset

    answers = [{"name": "giveaways", "arguments": {"ids": [1]}}, {"name": "giveaways", "arguments": {"type": "beta"}}]
    Dataset.from_list([row(answers=answers)]).to_parquet(tmp_path / "a.parquet")
    (dialogue,), report = read_dialogues(tmp_path / "a.parquet")
    assert [call["function"] for call in dialogue.messages[1]["tool_calls"]] == answers
    assert report.to_dict()["repaired_by_kind"]["null arguments left out"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": 3}, "query must be text"),
        ({"answers": {"name": "giveaways"}}, "answers a list or its JSON text"),
        ({"tools": "[{"}, "tools is text but no JSON"),
    ],
)
def test_rows_of_another_shape_are_errors(tmp_path, change, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row()) + "\n" + json.dumps(row(id=1, **change)))
    with pytest.raises(InputError, match=f"a.jsonl:2: .*{message}"):
        read_dialogues(tmp_path / "a.jsonl")
