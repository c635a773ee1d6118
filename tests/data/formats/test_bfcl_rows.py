from __future__ import annotations

import json
from pathlib import Path

import pytest

from ttpa.data.formats.bfcl import BFCL
from ttpa.data.formats.format import Place
from ttpa.data.read import kind_of, read_data
from ttpa.data.report import DataReport
from ttpa.data.rows import iterate_rows
from ttpa.errors import InputError
from ttpa.tools.schema import functions

AREA = {
    "name": "math.area",
    "description": "Area.",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "float"},
            "size": {"type": "tuple", "items": {"type": "integer"}},
            "unit": {"type": "any"},
        },
        "required": ["base"],
    },
}


def row(**changes) -> dict:
    question = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Area of 2?"}]]
    return {"id": "live_simple_106-63-0", "question": question, "function": [AREA], **changes}


def read(record: dict):
    report = DataReport(path="a.json", format="bfcl")
    return BFCL.read(record, Place(Path("a.json"), 1), report), report


def test_a_question_is_a_dialogue_without_an_answer():
    dialogue, report = read(row())
    assert (dialogue.id, dialogue.source["category"]) == ("live_simple_106-63-0", "live_simple")
    assert [message["role"] for message in dialogue.messages] == ["system", "user"]
    assert dialogue.source["functions"] == [AREA]
    parameters = functions(dialogue.tools)["math.area"]["parameters"]
    assert parameters["properties"]["base"] == {"type": "number"}
    assert parameters["properties"]["size"] == {"type": "array", "items": {"type": "integer"}}
    assert parameters["properties"]["unit"] == {} and parameters["required"] == ["base"]
    assert report.to_dict()["repaired_by_kind"] == {"type words read as JSON Schema": 1}


def test_nothing_is_trained_on_questions_or_answers(tmp_path, tokenizer):
    for record in (row(), {"id": "simple_python_0", "ground_truth": []}, {**row(), "involved_classes": []}):
        (tmp_path / "a.json").write_text(json.dumps(record))
        with pytest.raises(InputError, match="a benchmark, on which nothing may be trained"):
            read_data(tmp_path / "a.json", tokenizer=tokenizer, max_length=None)


def test_rows_with_an_answer_of_their_own_are_no_benchmark():
    assert not BFCL.matches({"id": "1", "question": "2 + 2?", "ground_truth": "4"})
    assert not BFCL.matches({"id": "1", "question": "2 + 2?", "function": "add"})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "simple_python_0", "ground_truth": []}, "these are possible answers"),
        (row(question=row()["question"] * 2), "only single-turn questions are read"),
        ({**row(), "involved_classes": ["GorillaFileSystem"]}, "only single-turn questions are read"),
        (row(question=[]), "the question must be a list of one turn"),
        (row(question=[[]]), "question must be a non-empty list of messages"),
        (row(function={}), "a BFCL question has id, question and function"),
        (row(function=[{"description": "x"}]), "a tool has no name"),
    ],
)
def test_rows_of_another_shape_are_refused(record, message):
    with pytest.raises(InputError, match=message):
        read(record)


def test_the_released_questions_have_valid_schemas(real_data):
    count = 0
    for file in sorted((real_data / "bfcl" / "question").glob("*.json")):
        assert kind_of(file)[0] == "evaluation"
        for line, record in iterate_rows(file):
            if line % 5 != 1:
                continue
            dialogue, _ = read(record)
            assert list(functions(dialogue.tools)) == [function["name"] for function in record["function"]]
            count += 1
    assert count == 248
