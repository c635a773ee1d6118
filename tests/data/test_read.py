from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import trl

from ttpa.data.read import read_data
from ttpa.data.toolbench import ToolBenchOptions
from ttpa.errors import InputError
from ttpa.trees.io import write_trees

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ROWS = [
    {"id": "a", "prompt": "The sky is", "chosen": " blue", "rejected": " green, I think"},
    {"id": "b", "prompt": "Grass is", "chosen": " green", "rejected": " blue"},
]


def write(file, rows) -> None:
    file.write_text("\n".join(map(json.dumps, rows)))


def test_rows_as_lines_as_an_array_and_as_written_trees(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS)
    trees, report = read_data(tmp_path / "a.jsonl", tokenizer=tokenizer, max_length=None)
    assert (report.format, report.read, report.kept) == ("preference", 2, 2)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    array, report = read_data(tmp_path / "a.json", tokenizer=tokenizer, max_length=None)
    assert [tree.nodes for tree in array] == [tree.nodes for tree in trees]
    assert [tree.origin["line"] for tree in array] == [2, 8]
    write_trees(tmp_path / "trees.jsonl", trees)
    again, report = read_data(tmp_path / "trees.jsonl", tokenizer=tokenizer, max_length=None)
    assert again == trees and (report.format, report.read, report.kept) == ("trees", 2, 2)


def test_trees_over_the_limit(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS)
    trees, _ = read_data(tmp_path / "a.jsonl", tokenizer=tokenizer, max_length=None)
    file = tmp_path / "trees.jsonl"
    write_trees(file, trees)
    length = len("The sky is green, I think") + 1
    kept, report = read_data(file, tokenizer=tokenizer, max_length=length - 1)
    assert [tree.id for tree in kept] == ["b"] and report.kept == 1
    assert (report.dropped[0]["id"], report.dropped[0]["reason"]) == ("a", "over max_length")
    assert read_data(file, tokenizer=tokenizer, max_length=length)[0] == trees
    with pytest.raises(InputError, match=f"trees.jsonl: 'a' has {length} tokens"):
        read_data(file, tokenizer=tokenizer, max_length=length - 1, on_overlength="error")


def test_a_toolbench_file_is_told_by_its_content(tmp_path, tokenizer):
    root = {"node_type": "Action Input", "description": "", "children": []}
    record = {"tree": {"tree": root}, "answer_generation": {"query": "x", "function": []}}
    (tmp_path / "a.json").write_text(json.dumps(record, indent=2))
    for path in (tmp_path, tmp_path / "a.json"):
        _, report = read_data(path, tokenizer=tokenizer, max_length=None)
        assert (report.format, report.read, report.kept) == ("toolbench", 1, 0)


def test_toolbench_is_read_as_its_options_say_and_errors_are_gone_over(tmp_path, tokenizer):
    def call(town, *children, code=0):
        inputs = {"node_type": "Action Input", "description": json.dumps({"town": town}), "children": list(children)}
        return {"node_type": "Action", "description": "rain", "children": [{**inputs, "observation_code": code}]}

    root = {"node_type": "Action Input", "description": "", "children": [call("A", code=12), call("B", code=3)]}
    generation = {"query": "x", "function": [{"name": "rain", "parameters": {"type": "object", "properties": {}}}]}
    (tmp_path / "a.json").write_text(json.dumps({"tree": {"tree": root}, "answer_generation": generation}))
    (tmp_path / "b.json").write_text("{}")
    errors: list[InputError] = []
    read = partial(read_data, tmp_path, tokenizer=tokenizer, max_length=None, on_error=errors.append)
    assert len(read()[0]) == 1 and len(read(toolbench=ToolBenchOptions(failures="skip"))[0]) == 0
    assert [str(error).partition(": ")[0] for error in errors] == [str(tmp_path / "b.json")] * 2


def test_a_folder_of_benchmark_questions_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text(json.dumps({"id": "irrelevance_0", "question": [[]], "function": []}))
    with pytest.raises(InputError, match="this is a benchmark, on which nothing may be trained"):
        read_data(tmp_path, tokenizer=tokenizer, max_length=None)


def test_a_tokenizer_without_a_chat_template(tmp_path, tokenizer):
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    says = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    write(tmp_path / "a.jsonl", [{"chosen": says, "rejected": [says[0], {"role": "assistant", "content": "z"}]}])
    with pytest.raises(InputError, match=r"a\.jsonl:1: messages need a tokenizer with a chat template"):
        read_data(tmp_path / "a.jsonl", tokenizer=other, max_length=None)
    write(tmp_path / "b.jsonl", ROWS)
    assert len(read_data(tmp_path / "b.jsonl", tokenizer=other, max_length=None)[0]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.jsonl: the file is empty"),
        ("\n\n", "a.jsonl: the file is empty"),
        (json.dumps(ROWS[0]) + '\n{"prompt": ', "a.jsonl:2: broken JSON"),
        (
            '{"text": "x", "label": 1}',
            "a.jsonl: rows of an unknown format; columns found: text, label; known: .*prompt, chosen, rejected",
        ),
        ('{"id": "d", "tools": [], "messages": []}', "a.jsonl: a file of dialogues holds no preferences"),
        ('{"id": "t", "prompt_ids": [], "nodes": []}', "a.jsonl:1: "),
        ("[1]", "a.jsonl:1: expected a JSON object, found list"),
    ],
)
def test_bad_files(tmp_path, tokenizer, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_data(tmp_path / "a.jsonl", tokenizer=tokenizer, max_length=None)


def test_a_broken_line_is_told_and_the_next_one_is_read(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ROWS)
    trees, _ = read_data(tmp_path / "a.jsonl", tokenizer=tokenizer, max_length=None)
    write_trees(tmp_path / "t.jsonl", trees)
    empty = {**trees[0].to_dict(), "leaves": [], "pairs": []}
    for name, broken in (("a", ["{", "[1]", '{"prompt": "x"}']), ("t", ["{", "[1]", json.dumps(empty)])):
        file = tmp_path / f"{name}.jsonl"
        lines = file.read_text().splitlines()
        file.write_text("\n".join([lines[0], *broken, lines[1]]))
        errors: list[InputError] = []
        found, report = read_data(file, tokenizer=tokenizer, max_length=None, on_error=errors.append)
        assert len(found) == report.kept == 2
        assert [str(error).partition(": ")[0] for error in errors] == [f"{file}:{line}" for line in (2, 3, 4)]
        with pytest.raises(InputError, match=f"{name}.jsonl:2: "):
            read_data(file, tokenizer=tokenizer, max_length=None)


def test_rows_that_the_template_cannot_write_are_left_out_and_listed(tmp_path, tokenizer):
    def call(*arguments):
        calls = [{"type": "function", "function": {"name": "f", "arguments": text}} for text in arguments]
        return [{"role": "assistant", "content": "", "tool_calls": calls}]

    function = {"name": "f", "description": "F.", "parameters": {"type": "object", "properties": {}}}
    prompt, tools = [{"role": "user", "content": "x"}], [{"type": "function", "function": function}]
    rows = [
        {"prompt": prompt, "chosen": call("{}"), "rejected": rejected, "tools": tools}
        for rejected in (call('{"a": 1}'), call("{}", "{}"), call('{"a": '))
    ]
    write(tmp_path / "a.jsonl", rows)
    other = copy.deepcopy(tokenizer)
    other.chat_template = (TEMPLATES / "llama3_1.jinja").read_text()
    trees, report = read_data(tmp_path / "a.jsonl", tokenizer=other, max_length=None)
    assert [tree.origin["line"] for tree in trees] == [1]
    assert [(drop["reason"], drop["where"][-1]) for drop in report.dropped] == [
        ("the chat template cannot write it", "2"),
        ("the chat template cannot write it", "3"),
    ]
    assert len(read_data(tmp_path / "a.jsonl", tokenizer=tokenizer, max_length=None)[0]) == 3


def test_errors_of_a_rejected_call_are_found_by_the_chosen_one(tmp_path, tokenizer):
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "rain", "parameters": city}}]

    def call(text="", **arguments):
        calls = [{"type": "function", "function": {"name": "rain", "arguments": arguments}}] if arguments else []
        return [{"role": "assistant", "content": text, "tool_calls": calls}]

    sides = {
        "value": (call(city="Oslo"), call(city="Rome")),
        "none": (call(city="Oslo"), call("It rains.")),
        "unwanted": (call("Where?"), call(city="Rome")),
        "same": (call(city="Oslo"), call("Well. ", city="Oslo")),
        "texts": (call("Where?"), call("It rains.")),
        "turns": (call(city="Oslo") + [{"role": "tool", "content": "no"}] + call("No."), call(city="Rome")),
    }
    prompt = [{"role": "user", "content": "Rain?"}]
    rows = [{"id": id, "prompt": prompt, "chosen": a, "rejected": b, "tools": tools} for id, (a, b) in sides.items()]
    write(tmp_path / "a.jsonl", rows)
    trees, report = read_data(tmp_path / "a.jsonl", tokenizer=tokenizer, max_length=None)
    found = {tree.id: ([error["code"] for error in tree.leaves[1].errors], tree.pairs[0].margin) for tree in trees}
    assert found == {
        "value": (["value.wrong"], 0.5),
        "none": (["no_call"], 1.0),
        "unwanted": (["unwanted_call"], 1.0),
        "same": ([], 0.0),
        "texts": ([], 0.0),
        "turns": ([], 0.0),
    }
    assert [tree.leaves[0].score for tree in trees] == [1.0] * 4 + [None] * 2
    start, end = trees[0].leaves[1].errors[0]["tokens"]
    assert tokenizer.decode(trees[0].completion_ids(1)[start:end]) == '"Rome"'
    assert report.counts == {"rejected sides with errors": 3, "rejected sides without errors": 1}


def test_errors_are_not_looked_for_where_a_schema_is_none(tmp_path, tokenizer):
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "dict"}}}]
    sides = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "rain", "arguments": {"city": city}}}],
        }
        for city in ("Oslo", "Rome")
    ]
    row = {"prompt": [{"role": "user", "content": "x"}], "chosen": [sides[0]], "rejected": [sides[1]], "tools": tools}
    write(tmp_path / "a.jsonl", [row])
    (tree,), report = read_data(tmp_path / "a.jsonl", tokenizer=tokenizer, max_length=None)
    assert tree.leaves[1].score is None and tree.leaves[1].errors == []
    assert report.notes == [
        "errors are not looked for in every row: tool 'rain': parameters must have the type \"object\", not 'dict'"
    ]


def test_missing_file(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        read_data(tmp_path / "none.jsonl", tokenizer=tokenizer, max_length=None)
