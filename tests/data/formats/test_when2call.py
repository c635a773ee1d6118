from __future__ import annotations

import json

import pytest

from ttpa.data.read import kind_of, read_data
from ttpa.errors import InputError

COMPANY = {
    "name": "company",
    "description": "A company by its domain.",
    "parameters": {"type": "dict", "properties": {"domain": {"description": "Its domain.", "type": "str"}}},
    "required": ["domain"],
}
CALL = '<TOOLCALL>[{"name": "company", "arguments": {"domain": "example.org"}}]</TOOLCALL>'


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def row(**changes) -> dict:
    asks = {"role": "user", "content": "Who is at example.org?"}
    sides = {"chosen_response": says(CALL), "rejected_response": says("Which domain do you mean?")}
    return {"tools": [COMPANY], "messages": [asks], **sides, **changes}


def read(folder, tokenizer, *rows: dict):
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_data(folder / "a.jsonl", tokenizer=tokenizer, max_length=None)


def test_written_calls_are_calls_and_type_words_are_schema(tmp_path, tokenizer):
    (tree,), report = read(tmp_path, tokenizer, row())
    assert tree.leaves[0].calls == [{"name": "company", "arguments": {"domain": "example.org"}}]
    assert "<TOOLCALL>" not in tokenizer.decode(tree.completion_ids(0))
    assert tokenizer.decode(tree.completion_ids(1)) == "Which domain do you mean?<|im_end|>\n"
    parameters = tree.tools[0]["function"]["parameters"]
    assert (parameters["type"], parameters["required"]) == ("object", ["domain"])
    assert parameters["properties"]["domain"]["type"] == "string"
    assert report.to_dict()["repaired_by_kind"] == {
        "type words read as JSON Schema": 1,
        "required moved to where JSON Schema has it": 1,
    }


def test_tools_and_calls_as_json_texts(tmp_path, tokenizer):
    """Both occur: datasets keeps objects of many shapes as texts, and the authors' script writes a call twice."""
    inner = json.dumps({"name": "company", "arguments": {"domain": "example.org"}})
    twice = row(tools=[json.dumps(COMPANY)], chosen_response=says(f"<TOOLCALL>[{json.dumps(inner)}]</TOOLCALL>"))
    trees, report = read(tmp_path, tokenizer, row(), twice)
    assert (trees[0].prompt_ids, trees[0].nodes) == (trees[1].prompt_ids, trees[1].nodes)
    assert report.to_dict()["repaired_by_kind"]["a call as JSON text inside JSON read"] == 1


def test_text_before_a_call_is_kept(tmp_path, tokenizer):
    (tree,), _ = read(tmp_path, tokenizer, row(chosen_response=says(f"Let me see. {CALL}")))
    assert tokenizer.decode(tree.completion_ids(0)).startswith("Let me see.\n<tool_call>")


def test_a_row_without_tools(tmp_path, tokenizer):
    """The question cannot be answered: the call names a tool that was taken away."""
    unable = row(tools=[], chosen_response=says("I cannot."), rejected_response=says(CALL))
    (tree,), _ = read(tmp_path, tokenizer, unable)
    assert tree.tools == [] and tree.leaves[1].calls[0]["name"] == "company"


def test_what_is_left_out_is_listed(tmp_path, tokenizer):
    rows = [
        row(rejected_response=says(CALL)),
        row(chosen_response=says("<TOOLCALL>[None]</TOOLCALL>")),
        row(chosen_response=says(CALL.removesuffix("</TOOLCALL>"))),
        row(chosen_response=says(f"{CALL} That is all.")),
        row(tools=[]),
    ]
    trees, report = read(tmp_path, tokenizer, *rows)
    assert trees == [] and [(entry["id"], entry["reason"]) for entry in report.dropped] == [
        ("a:1", "identical"),
        ("a:2", "a call cannot be read"),
        ("a:3", "a call cannot be read"),
        ("a:4", "a call cannot be read"),
        ("a:5", "chosen call names no tool"),
    ]


def test_a_rejected_call_that_cannot_be_read_stays_text(tmp_path, tokenizer):
    (tree,), report = read(tmp_path, tokenizer, row(rejected_response=says('<TOOLCALL>[{"name": ]</TOOLCALL>')))
    assert tokenizer.decode(tree.completion_ids(1)).startswith('<TOOLCALL>[{"name": ]')
    assert report.to_dict()["repaired_by_kind"]["rejected call that cannot be read kept as text"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages must be a non-empty list"),
        ({"chosen_response": "yes"}, "chosen_response message 0: the role must be"),
        ({"chosen_response": {"role": "user", "content": "yes"}}, "chosen_response must be a message of the assistant"),
        ({"rejected_response": None}, "rejected_response message 0"),
        ({"tools": "[{"}, "tools is text but no JSON"),
        ({"tools": [{}]}, "a tool has no name"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, tokenizer, change, message):
    with pytest.raises(InputError, match=f"a.jsonl:2: .*{message}"):
        read(tmp_path, tokenizer, row(), row(**change))


def test_nothing_is_trained_on_test_rows(tmp_path, tokenizer):
    answers = {"direct": "It is.", "tool_call": "{}", "request_for_info": "Which?", "cannot_answer": "I cannot."}
    test = {"uuid": "u1", "question": "Who?", "correct_answer": "cannot_answer", "answers": answers, "tools": []}
    with pytest.raises(InputError, match="a benchmark, on which nothing may be trained"):
        read(tmp_path, tokenizer, test)
    kind, row_format = kind_of(tmp_path / "a.jsonl")
    assert (kind, row_format.name) == ("evaluation", "when2call test")
