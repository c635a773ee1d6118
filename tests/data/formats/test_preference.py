from __future__ import annotations

import json
from pathlib import Path

import pytest

from ttpa.data.read import read_data
from ttpa.data.render import render_messages
from ttpa.errors import InputError

USER = {"role": "user", "content": "Rain in Oslo?"}


def tool(name: str, *parameters: str) -> dict:
    schema = {"type": "object", "properties": {p: {"type": "string"} for p in parameters}}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": schema}}


def call(name: str | None, arguments) -> list[dict]:
    function = {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
    return [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}]


def row(**changes) -> dict:
    sides = {"chosen": call("weather", '{"city": "Oslo"}'), "rejected": call("weather", {"city": "Osloo"})}
    return {"prompt": [USER], **sides, "tools": [tool("weather", "city")], **changes}


def read(path: Path, tokenizer, rows: list[dict] | None = None, **limits):
    if rows is not None:
        path.write_text("\n".join(map(json.dumps, rows)))
    return read_data(path, tokenizer=tokenizer, **{"max_length": None, **limits})


def test_a_row_is_a_tree_that_forks_where_the_sides_differ(tmp_path, tokenizer):
    (tree,), report = read(tmp_path / "a.jsonl", tokenizer, [row(id="r1")])
    text = [tokenizer.decode(node.ids) for node in tree.nodes]
    assert text[0].endswith('{"city": "Oslo') and text[1].startswith('"}') and text[2].startswith("o")
    assert [node.parent for node in tree.nodes] == [-1, 0, 0]
    assert [leaf.calls for leaf in tree.leaves] == [
        [{"name": "weather", "arguments": {"city": "Oslo"}}],
        [{"name": "weather", "arguments": {"city": "Osloo"}}],
    ]
    assert (tree.id, tree.pairs[0].chosen, tree.pairs[0].rejected, len(tree.pairs)) == ("r1", 0, 1, 1)
    assert tree.tools == row()["tools"] and tree.messages == [USER]
    assert (report.read, report.kept, report.dropped, report.repaired) == (1, 1, [], [])


def test_argument_text_renders_as_its_dict(tmp_path, tokenizer):
    """A template that writes arguments with tojson would encode a text twice."""
    trees, _ = read(tmp_path / "a.jsonl", tokenizer, [row(), row(chosen=call("weather", {"city": "Oslo"}))])
    assert trees[0].nodes == trees[1].nodes


def test_plain_rows_with_and_without_prompt(tmp_path, tokenizer):
    rows = [
        {"prompt": "The sky is", "chosen": " blue", "rejected": " green"},
        {"chosen": "The sky is blue", "rejected": "The sky is green"},
    ]
    trees, _ = read(tmp_path / "a.jsonl", tokenizer, rows)
    assert trees[0].prompt_ids == trees[1].prompt_ids == tokenizer("The sky is")["input_ids"]
    assert trees[0].nodes == trees[1].nodes and trees[0].leaves == trees[1].leaves
    assert [tree.id for tree in trees] == ["a:1", "a:2"]
    assert tokenizer.decode(trees[0].completion_ids(1)) == " green<|im_end|>"


def test_the_prompt_that_conversations_share(tmp_path, tokenizer):
    explicit = row()
    implicit = row(chosen=[USER, *explicit["chosen"]], rejected=[USER, *explicit["rejected"]])
    del implicit["prompt"]
    trees, _ = read(tmp_path / "a.jsonl", tokenizer, [explicit, implicit])
    assert (trees[0].prompt_ids, trees[0].nodes) == (trees[1].prompt_ids, trees[1].nodes)


def test_a_prompt_of_several_turns_that_conversations_share(tmp_path, tokenizer):
    shared = [USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And in Rome?"}]
    sides = {
        side: [*shared, {"role": "assistant", "content": word}]
        for side, word in (("chosen", "No."), ("rejected", "Yes."))
    }
    (tree,), _ = read(tmp_path / "a.jsonl", tokenizer, [sides])
    assert tree.messages == shared
    assert [tokenizer.decode(tree.completion_ids(leaf)) for leaf in (0, 1)] == ["No.<|im_end|>\n", "Yes.<|im_end|>\n"]


def test_a_prompt_in_text_beside_conversations_that_begin_with_it(tmp_path, tokenizer):
    whole = {side: [USER, *row()[side]] for side in ("chosen", "rejected")}
    trees, report = read(tmp_path / "a.jsonl", tokenizer, [row(), row(prompt=USER["content"], **whole)])
    assert (trees[0].prompt_ids, trees[0].nodes) == (trees[1].prompt_ids, trees[1].nodes)
    assert report.to_dict()["repaired_by_kind"] == {"prompt that both sides repeat left out": 1}


def test_messages_in_their_older_forms(tmp_path, tokenizer):
    """A function_call, the role function, and a content in parts."""
    chosen = [
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        {"role": "function", "name": "weather", "content": "2 mm"},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    (tree,), report = read(tmp_path / "a.jsonl", tokenizer, [row(chosen=chosen)])
    assert tree.leaves[0].calls == [{"name": "weather", "arguments": {"city": "Oslo"}}]
    assert tokenizer.decode(tree.completion_ids(0)).endswith("Yes.<|im_end|>\n")
    assert len(report.repaired) == 3


def test_tools_as_text_and_no_tools(tmp_path, tokenizer):
    rows = [row(), row(tools=json.dumps(row()["tools"]))]
    says = [{"role": "assistant", "content": word} for word in ("Yes.", "No.")]
    rows += [{"prompt": [USER], "chosen": says[:1], "rejected": says[1:], "tools": tools} for tools in ([], "[]", None)]
    trees, _ = read(tmp_path / "a.jsonl", tokenizer, rows)
    assert trees[0].prompt_ids == trees[1].prompt_ids
    assert trees[2].prompt_ids == trees[3].prompt_ids == trees[4].prompt_ids
    assert "<tools>" not in tokenizer.decode(trees[2].prompt_ids)


def test_tool_results_are_not_trained(tmp_path, tokenizer):
    answer = [{"role": "tool", "content": "2 mm"}, {"role": "assistant", "content": "Yes."}]
    (tree,), _ = read(tmp_path / "a.jsonl", tokenizer, [row(chosen=row()["chosen"] + answer)])
    ids, trained = tree.completion_ids(0), tree.trained(0)
    kept = tokenizer.decode([token for token, one in zip(ids, trained, strict=True) if one])
    assert "2 mm" in tokenizer.decode(ids) and "2 mm" not in kept and kept.endswith("Yes.<|im_end|>\n")
    assert tree.leaves[0].calls == [{"name": "weather", "arguments": {"city": "Oslo"}}]


def test_equal_sides_are_dropped_and_listed(tmp_path, tokenizer):
    equal = row(id="same", rejected=call("weather", {"city": "Oslo"}))
    trees, report = read(tmp_path / "a.jsonl", tokenizer, [row(), equal])
    assert len(trees) == 1 == report.kept and report.read == 2
    (dropped,) = report.dropped
    assert (dropped["id"], dropped["reason"]) == ("same", "identical")
    assert dropped["where"] == f"{tmp_path / 'a.jsonl'}:2"


def test_equal_sides_without_a_prompt_are_said_to_be_equal(tmp_path, tokenizer):
    rows = [{"chosen": side, "rejected": side} for side in ("a", "a b", [USER, *row()["chosen"]], [USER])]
    trees, report = read(tmp_path / "a.jsonl", tokenizer, rows)
    assert trees == []
    assert {entry["detail"] for entry in report.dropped} == {"chosen and rejected are equal"}
    assert report.to_dict()["dropped_by_reason"] == {"identical": 4}


def test_true_is_not_one_and_the_order_of_keys_counts(tmp_path, tokenizer):
    """In Python they are equal, but a template writes them differently."""
    sides = [({"city": 1}, {"city": True}), ({"city": 1}, {"city": 1.0}), ({"a": 1, "b": 2}, {"b": 2, "a": 1})]
    rows = [row(chosen=call("weather", one), rejected=call("weather", other)) for one, other in sides]
    implicit = [
        {"chosen": [USER, *r["chosen"], USER], "rejected": [USER, *r["rejected"], USER], "tools": r["tools"]}
        for r in rows
    ]
    trees, report = read(tmp_path / "a.jsonl", tokenizer, rows + implicit)
    assert len(trees) == 6 and report.dropped == []
    assert all(tree.messages == [USER] for tree in trees)


def test_a_row_over_the_limit(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    (tree,), _ = read(file, tokenizer, [row(id="long")])
    length = len(tree.prompt_ids) + max(len(tree.completion_ids(leaf)) for leaf in (0, 1))
    assert len(read(file, tokenizer, max_length=length)[0]) == 1
    trees, report = read(file, tokenizer, max_length=length - 1)
    assert trees == []
    assert report.dropped == [
        {
            "id": "long",
            "where": f"{file}:1",
            "reason": "over max_length",
            "detail": f"{length} tokens, max_length is {length - 1}",
        }
    ]
    with pytest.raises(InputError, match=f"a.jsonl:1: 'long' has {length} tokens, more than max_length {length - 1}"):
        read(file, tokenizer, max_length=length - 1, on_overlength="error")


def test_a_rejected_call_may_name_no_tool(tmp_path, tokenizer):
    (tree,), report = read(tmp_path / "a.jsonl", tokenizer, [row(rejected=call("wether", {"city": "Oslo"}))])
    assert tree.leaves[1].calls[0]["name"] == "wether" and report.dropped == []


def test_without_a_tools_column_nothing_is_known_of_the_tools(tmp_path, tokenizer):
    (tree,), _ = read(tmp_path / "a.jsonl", tokenizer, [row(tools=None)])
    assert tree.tools == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": call("wether", {})}, "chosen calls 'wether', which names no tool; the row offers weather"),
        ({"tools": []}, "which names no tool; the row offers none"),
        ({"chosen": call(None, {})}, "chosen message 0: a tool call has no name"),
        ({"rejected": call(None, {})}, "rejected message 0: a tool call has no name"),
        ({"rejected": call("", {})}, "rejected message 0: a tool call has no name"),
        ({"rejected": call("weather", [1])}, "arguments of 'weather' must be an object or its JSON text"),
        ({"tools": "[{"}, "tools is text but no JSON"),
        ({"tools": {"name": "weather"}}, "tools must be a list or its JSON text, not dict"),
        ({"tools": [{"type": "function"}]}, "tool 0 has no name"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be a dict"),
        ({"prompt": "Rain?"}, "all text or all lists of messages, found prompt: str, chosen: list.*drop a prompt"),
        ({"prompt": []}, "prompt must be a non-empty list of messages"),
        ({"chosen": []}, "chosen must be a non-empty list of messages"),
        ({"chosen": [{"role": "bot", "content": ""}]}, "chosen message 0: the role must be one of .*, not 'bot'"),
        ({"chosen": [{"role": "assistant", "content": 3}]}, "chosen message 0: the content must be text"),
        ({"chosen": None}, "columns found: prompt, chosen, rejected, tools; accepted: id, prompt, chosen"),
        ({"tool": []}, None),
        ({"prompt": None}, "share no first message"),
        ({"prompt": None, "chosen": "yes", "rejected": "no"}, "share no beginning; give the prompt in a column"),
        ({"prompt": "Rain?", "chosen": "yes", "rejected": [USER]}, "found prompt: str, chosen: str, rejected: list"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, tokenizer, change, message):
    rows = [row(), row(**change)]
    if message is None:
        del rows[1]["tools"]
        message = "unknown column 'tool': did you mean 'tools'"
    with pytest.raises(InputError, match=f"a.jsonl:2: .*{message}"):
        read(tmp_path / "a.jsonl", tokenizer, rows)


def test_other_columns_are_noted(tmp_path, tokenizer):
    _, report = read(tmp_path / "a.jsonl", tokenizer, [row(score=1, prompt_id=2), row(score=2)])
    assert report.notes == ["column 'score' is not used", "column 'prompt_id' is not used"]


def test_arguments_that_are_no_json_stay_text(tmp_path, tokenizer):
    (tree,), report = read(tmp_path / "a.jsonl", tokenizer, [row(rejected=call("weather", '{"city": Oslo'))])
    assert tree.leaves[1].calls == [{"name": "weather", "arguments": '{"city": Oslo'}]
    assert '"arguments": {"city": Oslo}' in tokenizer.decode(tree.completion_ids(1))
    (repair,) = report.repaired
    assert repair["repair"] == "arguments are no JSON object, kept as text" and repair["detail"].startswith("rejected")


def test_missing_arguments_are_none(tmp_path, tokenizer):
    (tree,), report = read(tmp_path / "a.jsonl", tokenizer, [row(rejected=call("weather", ""))])
    assert tree.leaves[1].calls == [{"name": "weather", "arguments": {}}]
    assert report.to_dict()["repaired_by_kind"] == {"missing arguments read as none": 1}


def test_nulls_of_json_that_was_written_from_arrow(tmp_path, tokenizer):
    """A null under a name that the tool has may be meant; one under another tool's name is not."""
    (tree,), report = read(
        tmp_path / "a.jsonl", tokenizer, [row(rejected=call("weather", {"city": None, "day": None}))]
    )
    assert tree.leaves[1].calls == [{"name": "weather", "arguments": {"city": None}}]
    assert report.to_dict()["repaired_by_kind"] == {"null arguments left out": 1}


def test_parquet_reads_as_the_lines_it_was_made_from(tmp_path, tokenizer):
    """Arrow gives both calls and both tools the keys of the other, with null as value."""
    from datasets import Dataset

    time = {"chosen": call("time", {"zone": "CET"}), "rejected": call("time", {"zone": "UTC"})}
    rows = [row(chosen=call("weather", {"city": "Oslo"})), row(**time, tools=[tool("time", "zone")])]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    stored, report = read(tmp_path / "a.parquet", tokenizer)
    plain, _ = read(tmp_path / "a.jsonl", tokenizer, rows)
    for one, other in zip(stored, plain, strict=True):
        assert (one.prompt_ids, one.nodes, one.leaves, one.tools) == (
            other.prompt_ids,
            other.nodes,
            other.leaves,
            other.tools,
        )
    assert report.to_dict()["repaired_by_kind"] == {
        "nulls that Arrow put into tools left out": 2,
        "null arguments left out": 4,
    }


def test_nulls_under_a_tool_whose_parameters_are_no_schema(tmp_path, tokenizer):
    """Nothing is known of its parameters, so no null can be told to be meant."""
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}} for parameters in ([], 1)]
    for listed in tools:
        rejected = call("weather", {"city": None})
        (tree,), _ = read(tmp_path / "a.jsonl", tokenizer, [row(tools=[listed], rejected=rejected)])
        assert tree.leaves[1].calls == [{"name": "weather", "arguments": {}}]


def test_bad_parquet(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"a\.parquet: no such file"):
        read(tmp_path / "a.parquet", tokenizer)
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(InputError, match=r"a\.parquet: no readable Parquet file"):
        read(tmp_path / "a.parquet", tokenizer)


def test_chat_template_kwargs_of_a_row(tmp_path, tokenizer):
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    other.chat_template = "{{ mood }}{% for m in messages %}{{ m.content }}|{% endfor %}"
    says = [[{"role": "assistant", "content": word}] for word in ("Yes", "No")]
    rows = [{"prompt": [USER], "chosen": says[0], "rejected": says[1], "chat_template_kwargs": {"mood": "glad "}}]
    (tree,), _ = read(tmp_path / "a.jsonl", other, rows)
    assert other.decode(tree.prompt_ids) == "glad Rain in Oslo?|"


def test_a_moved_prompt_is_listed(tmp_path, tokenizer):
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    other.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}{{ '<think>' if add_generation_prompt }}"
    says = [[{"role": "assistant", "content": word}] for word in ("Yes", "No")]
    (tree,), report = read(tmp_path / "a.jsonl", other, [{"prompt": [USER], "chosen": says[0], "rejected": says[1]}])
    assert tree.prompt_ids == render_messages(other, [USER], says, tools=[]).prompt_ids
    assert report.repaired[0]["detail"] == "7 tokens"
