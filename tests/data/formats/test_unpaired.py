from __future__ import annotations

import json
from pathlib import Path

import pytest

from ttpa.data.build import Limits, build_tree
from ttpa.data.formats.format import Place
from ttpa.data.formats.unpaired import pair_rows, read_row
from ttpa.data.read import read_data
from ttpa.data.report import DataReport
from ttpa.errors import InputError

USER = {"role": "user", "content": "Rain in Oslo?"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def row(prompt, completion, label, **more) -> dict:
    return {"prompt": prompt, "completion": completion, "label": label, **more}


def says(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def pairs(*rows: dict) -> tuple[list, DataReport]:
    report = DataReport(path="a.jsonl", format="unpaired preference")
    places = [Place(Path("a.jsonl"), line) for line in range(1, len(rows) + 1)]
    halves = [(place, read_row(r, place, report)) for place, r in zip(places, rows, strict=True)]
    return [example for _, example in pair_rows(halves, report)], report


def test_a_good_completion_is_preferred_to_all_bad_ones_of_its_prompt():
    rows = [row("The sky is", word, word == " blue") for word in (" green", " blue", " red")]
    rows += [row("Grass is", " blue", False), row("Grass is", " green", True)]
    examples, report = pairs(*rows)
    assert [(e.id, e.prompt, e.chosen, e.rejected) for e in examples] == [
        ("a:2", "The sky is", " blue", [" green", " red"]),
        ("a:5", "Grass is", " green", [" blue"]),
    ]
    assert report.dropped == []


def test_each_good_completion_makes_an_example():
    examples, _ = pairs(*(row("p", word, word != "c") for word in "abc"))
    assert [(e.chosen, e.rejected) for e in examples] == [("a", ["c"]), ("b", ["c"])]


def test_what_has_no_partner_is_listed():
    examples, report = pairs(row("p", "a", True, id="good"), row("q", "a", False, id="bad"))
    assert examples == []
    assert [(e["id"], e["where"], e["reason"], e["detail"]) for e in report.dropped] == [
        ("good", "a.jsonl:1", "no partner", "no completion of this prompt is labelled false"),
        ("bad", "a.jsonl:2", "no partner", "no completion of this prompt is labelled true"),
    ]


def test_the_same_question_with_other_tools_is_another_prompt():
    rows = [row([USER], says("Yes."), True, tools=[TOOL]), row([USER], says("No."), False)]
    assert pairs(*rows)[0] == []
    assert len(pairs(rows[0], {**rows[1], "tools": [TOOL]})[0]) == 1


def test_repeated_rows_are_listed_once():
    examples, report = pairs(row("p", "a", True), row("p", "b", False), row("p", "a", True), row("p", "b", False))
    assert len(examples) == 1 and examples[0].rejected == ["b"]
    assert [(e["id"], e["reason"]) for e in report.dropped] == [("a:3", "repeated row"), ("a:4", "repeated row")]


def test_a_completion_that_is_called_good_and_bad(tokenizer):
    (example,), report = pairs(row("p", "a", True), row("p", "a", False), row("p", "b", False))
    tree = build_tree(example, tokenizer=tokenizer, limits=Limits(None), report=report)
    assert len(tree.leaves) == 2 and [e["reason"] for e in report.dropped] == ["identical"]


def test_conversations_with_calls_make_trees(tokenizer):
    def call(city: str) -> list[dict]:
        function = {"name": "weather", "arguments": f'{{"city": "{city}"}}'}
        return [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}]

    rows = [row([USER], call(city), city == "Oslo", tools=[TOOL]) for city in ("Oslo", "Osloo")]
    (example,), report = pairs(*rows)
    tree = build_tree(example, tokenizer=tokenizer, limits=Limits(None), report=report)
    assert [leaf.calls[0]["arguments"]["city"] for leaf in tree.leaves] == ["Oslo", "Osloo"]
    with pytest.raises(InputError, match="completion calls 'weather', which names no tool; the row offers none"):
        pairs(row([USER], call("Oslo"), True, tools=[]))


def test_a_file_reads_as_the_pairs_that_it_was_made_of(tmp_path, tokenizer):
    paired = [{"prompt": "The sky is", "chosen": " blue", "rejected": " green"}]
    paired += [{"prompt": "Grass is", "chosen": " green", "rejected": " blue"}]
    unpaired = [row(r["prompt"], r["chosen"], True) for r in paired] + [
        row(r["prompt"], r["rejected"], False) for r in paired
    ]
    unpaired.append(row("Snow is", " white", True))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, paired)))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, unpaired)))
    trees, _ = read_data(tmp_path / "pairs.jsonl", tokenizer=tokenizer, max_length=None)
    found, report = read_data(tmp_path / "rows.jsonl", tokenizer=tokenizer, max_length=None)
    assert [(tree.prompt_ids, tree.nodes) for tree in found] == [(tree.prompt_ids, tree.nodes) for tree in trees]
    assert (report.format, report.read, report.kept) == ("unpaired preference", 5, 2)
    assert [entry["where"] for entry in report.dropped] == [f"{tmp_path / 'rows.jsonl'}:5"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("p", "a", None), "the label must be true or false, not None"),
        (row("p", "a", 1), "the label must be true or false, not 1"),
        (row(None, "a", True), "the prompt is missing"),
        (row("p", says("a"), True), "prompt, completion must be all text or all lists"),
        (row("p", None, True), "columns found: prompt, completion; accepted: id, prompt, completion"),
        (row("p", "a", True, tool=[]), "unknown column 'tool': did you mean 'tools'"),
    ],
)
def test_bad_rows(bad, message):
    with pytest.raises(InputError, match=message):
        pairs(bad)
