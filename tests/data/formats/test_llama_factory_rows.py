from __future__ import annotations

import json

import pytest

from ttpa.data.read import read_data
from ttpa.errors import InputError

RAIN = {
    "name": "rain",
    "description": "Rain in a town.",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}


def turn(role: str, value: str) -> dict:
    return {"from": role, "value": value}


def calling(town: str) -> dict:
    return turn("function_call", json.dumps({"name": "rain", "arguments": {"town": town}}))


def share_gpt(**changes) -> dict:
    row = {
        "conversations": [
            turn("human", "Rain in Rome?"),
            calling("Rome"),
            turn("observation", '{"mm": 0}'),
            turn("gpt", "No."),
            turn("human", "And in Oslo?"),
        ],
        "chosen": calling("Oslo"),
        "rejected": turn("gpt", "I do not know."),
        "tools": json.dumps([RAIN]),
        "system": "Be brief.",
    }
    return {**row, **changes}


def alpaca(**changes) -> dict:
    row = {"instruction": "Name a colour.", "input": "Of the sky.", "chosen": "Blue.", "rejected": "Green."}
    return {**row, **changes}


def read(folder, tokenizer, *rows: dict):
    (folder / "a.json").write_text(json.dumps(rows))
    return read_data(folder / "a.json", tokenizer=tokenizer, max_length=None)


def test_a_share_gpt_row_is_a_tree(tmp_path, tokenizer):
    (tree,), report = read(tmp_path, tokenizer, share_gpt())
    assert (report.format, report.dropped, report.repaired) == ("llama_factory", [], [])
    assert tree.tools == [{"type": "function", "function": RAIN}]
    assert [message["role"] for message in tree.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]
    assert tree.messages[2]["tool_calls"][0]["function"] == {"name": "rain", "arguments": {"town": "Rome"}}
    assert tree.leaves[0].calls == [{"name": "rain", "arguments": {"town": "Oslo"}}]
    assert tokenizer.decode(tree.completion_ids(1)) == "I do not know.<|im_end|>\n"


def test_an_alpaca_row_is_a_tree(tmp_path, tokenizer):
    (tree,), _ = read(tmp_path, tokenizer, alpaca(history=[["Hello.", "Hi."]], system="Be brief."))
    assert tree.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Name a colour.\nOf the sky."},
    ]
    assert [tokenizer.decode(tree.completion_ids(leaf)) for leaf in (0, 1)] == [
        "Blue.<|im_end|>\n",
        "Green.<|im_end|>\n",
    ]


def test_both_sides_in_the_output_of_an_alpaca_row(tmp_path, tokenizer):
    older = {"instruction": "Name a colour.\nOf the sky.", "input": "", "output": ["Blue.", "Green."]}
    trees, _ = read(tmp_path, tokenizer, alpaca(), older)
    assert (trees[0].prompt_ids, trees[0].nodes) == (trees[1].prompt_ids, trees[1].nodes)


def test_turns_under_the_names_of_openai(tmp_path, tokenizer):
    def renamed(value):
        if isinstance(value, list):
            return [renamed(part) for part in value]
        roles = {"human": "user", "gpt": "assistant", "observation": "tool"}
        return {"role": roles.get(value["from"], value["from"]), "content": value["value"]}

    row = share_gpt()
    sides = {side: renamed(row[side]) for side in ("chosen", "rejected")}
    other = {**row, "messages": renamed(row["conversations"]), **sides}
    del other["conversations"]
    trees, _ = read(tmp_path, tokenizer, row, other)
    assert (trees[0].prompt_ids, trees[0].nodes) == (trees[1].prompt_ids, trees[1].nodes)


def test_several_calls_in_a_turn(tmp_path, tokenizer):
    calls = [{"name": "rain", "arguments": {"town": town}} for town in ("Oslo", "Bergen")]
    (tree,), _ = read(tmp_path, tokenizer, share_gpt(chosen=turn("function_call", json.dumps(calls))))
    assert tree.leaves[0].calls == calls


def test_without_tools_nothing_is_known_of_the_names(tmp_path, tokenizer):
    (tree,), report = read(tmp_path, tokenizer, share_gpt(tools=""))
    assert tree.tools == [] and tree.leaves[0].calls[0]["name"] == "rain" and report.dropped == []


def test_what_is_left_out_is_listed(tmp_path, tokenizer):
    rows = [
        share_gpt(rejected=calling("Oslo")),
        share_gpt(chosen=turn("function_call", "rain in Oslo")),
        share_gpt(chosen=turn("function_call", '{"name": "snow", "arguments": {}}')),
        share_gpt(tools='[{"name": "rain", "parameters": {"type": "object", "properties": [1]}}]'),
    ]
    trees, report = read(tmp_path, tokenizer, *rows)
    assert trees == [] and [entry["reason"] for entry in report.dropped] == [
        "identical",
        "a call cannot be read",
        "chosen call names no tool",
        "a tool has no valid schema",
    ]


def test_a_rejected_call_that_cannot_be_read_stays_text(tmp_path, tokenizer):
    (tree,), report = read(tmp_path, tokenizer, share_gpt(rejected=turn("function_call", '{"name": "rain",')))
    assert tokenizer.decode(tree.completion_ids(1)).startswith('{"name": "rain",<|im_end|>')
    assert report.to_dict()["repaired_by_kind"] == {"rejected call that cannot be read kept as text": 1}


def test_calls_in_the_quotes_of_python_are_repaired(tmp_path, tokenizer):
    chosen = turn("function_call", "{'name': 'rain', 'arguments': {'town': 'Oslo'}}")
    (tree,), report = read(tmp_path, tokenizer, share_gpt(chosen=chosen))
    assert tree.leaves[0].calls == [{"name": "rain", "arguments": {"town": "Oslo"}}]
    assert len(report.repaired) == 1


def test_null_arguments_that_arrow_made_are_left_out(tmp_path, tokenizer):
    from datasets import Dataset

    def side(name: str, **arguments) -> dict:
        return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}

    rows = [
        {"messages": [{"role": "user", "content": "a"}], "chosen": side("rain", town="Oslo"), "rejected": worse}
        for worse in (side("rain", town="Rome"), side("rain", day="today"))
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    trees, report = read_data(tmp_path / "a.parquet", tokenizer=tokenizer, max_length=None)
    found = [tree.leaves[1].calls for tree in trees]
    assert found == [[{"name": "rain", "arguments": arguments}] for arguments in ({"town": "Rome"}, {"day": "today"})]
    assert report.to_dict()["repaired_by_kind"] == {"null arguments left out": 2}


def test_other_columns_are_noted(tmp_path, tokenizer):
    _, report = read(tmp_path, tokenizer, alpaca(score=1))
    assert report.notes == ["column 'score' is not used"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (share_gpt(conversations=[turn("human", "a"), turn("gpt", "b")]), "prompt must end with a turn of the user or"),
        (share_gpt(conversations=[]), "conversations must be a non-empty list"),
        (share_gpt(conversations=[turn("bot", "a")]), "conversations 0: the role must be one of .*'bot'"),
        (share_gpt(conversations=["a"]), "conversations 0 must be an object with from and value, not 'a'"),
        (share_gpt(conversations=[turn("human", 1)]), "conversations 0 must be text, not 1"),
        (share_gpt(chosen=turn("human", "a")), "chosen must be a turn of the model, not of the user"),
        (share_gpt(chosen="a"), "chosen must be an object with from and value, not 'a'"),
        (share_gpt(images=["a.png"]), "the row has images, and only text can be read"),
        (share_gpt(tools="[{"), "tools is text but no JSON"),
        (alpaca(instruction="", input=""), "instruction and input are empty"),
        (alpaca(history=["a"]), "history 0 must be a question and its answer, not 'a'"),
        (alpaca(chosen={"value": "a"}), "chosen must be text, not {'value': 'a'}"),
        ({"instruction": "a", "output": ["b"]}, r"needs both texts in output, not \['b'\]"),
        ({"instruction": "a", "output": "bc"}, "needs both texts in output, not 'bc'"),
        ({"instruction": "a"}, "needs both texts in output, not None"),
        (alpaca(history=1.5), "history must be a list of questions and answers, not 1.5"),
        ({"chosen": calling("Oslo"), "rejected": calling("Rome")}, "messages must be a non-empty list"),
        (share_gpt(rejected=None), "rejected must be an object with from and value, not None"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, tokenizer, row, message):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, (share_gpt(), row))))
    with pytest.raises(InputError, match=f"a.jsonl:2: .*{message}"):
        read_data(tmp_path / "a.jsonl", tokenizer=tokenizer, max_length=None)
