from __future__ import annotations

import json

import pytest

from ttpa.data.read import read_data
from ttpa.errors import InputError

BETTER = '\nThought: The town was misspelled.\nAction: rain\nAction Input: {"town": "Oslo"}'
WORSE = '\nThought: \nAction: rain\nAction Input: {"town": "Osloo"}'


def row(**changes) -> dict:
    first = {"id": "G1_7", "category": "G1", "instruction": "You can call these tools: rain.", "input": "Rain in Oslo?"}
    return {**first, "output": [BETTER, WORSE], **changes}


def read(folder, tokenizer, *rows: dict):
    (folder / "a.json").write_text(json.dumps(rows))
    return read_data(folder / "a.json", tokenizer=tokenizer, max_length=None)


def test_a_row_is_a_tree_of_texts(tmp_path, tokenizer):
    (tree,), report = read(tmp_path, tokenizer, row())
    assert (report.format, tree.id) == ("tool_preference", "G1_7")
    assert tree.messages == [{"role": "user", "content": "You can call these tools: rain.\nRain in Oslo?"}]
    assert [tokenizer.decode(tree.completion_ids(leaf)) for leaf in (0, 1)] == [
        f"{text}<|im_end|>\n" for text in (BETTER, WORSE)
    ]
    assert tree.tools == [] and "nothing is known of the errors" in report.notes[0]


def test_a_step_may_be_a_thought_alone(tmp_path, tokenizer):
    trees, _ = read(tmp_path, tokenizer, row(output=[BETTER, "Thought: I give up."]))
    assert len(trees) == 1


def test_equal_steps_are_listed(tmp_path, tokenizer):
    trees, report = read(tmp_path, tokenizer, row(output=[BETTER, BETTER]))
    assert trees == [] and [entry["reason"] for entry in report.dropped] == ["identical"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": [BETTER]}, "output must be two texts"),
        ({"output": [BETTER, 1]}, "output must be two texts"),
        ({"output": [BETTER, "rain(town='Oslo')"]}, "the worse step has no line that starts with Thought: or Action:"),
        ({"output": ["Yes.", WORSE]}, "the better step has no line"),
        ({"instruction": " "}, "the instruction is empty"),
        ({"input": None}, "input must be text, not None"),
        ({"history": []}, "unknown column 'history'"),
    ],
)
def test_rows_of_another_shape_are_refused(tmp_path, tokenizer, change, message):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, (row(), row(**change)))))
    with pytest.raises(InputError, match=f"a.jsonl:2: {message}"):
        read_data(tmp_path / "a.jsonl", tokenizer=tokenizer, max_length=None)
