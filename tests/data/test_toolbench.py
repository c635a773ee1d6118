from __future__ import annotations

import json

import pytest

from ttpa.data.build import Limits
from ttpa.data.toolbench import ToolBenchOptions, read_toolbench
from ttpa.errors import InputError


def thought(text: str, *children: dict) -> dict:
    return {"node_type": "Thought", "description": text, "children": list(children)}


def call(name: str, arguments: str, *children: dict, observation: str = "ok", code: int = 0) -> dict:
    inputs = {"node_type": "Action Input", "description": arguments, "children": list(children)}
    inputs |= {"observation": observation, "observation_code": code, "is_terminal": False}
    return {"node_type": "Action", "description": name, "children": [inputs]}


def answer(text: str = "2 mm") -> dict:
    arguments = json.dumps({"return_type": "give_answer", "final_answer": text})
    return call("Finish", arguments, code=3)


def write(folder, *children: dict, name: str = "1.json", **changes) -> None:
    function = {
        "name": "rain",
        "description": "Rain.",
        "parameters": {"type": "object", "properties": {}, "optional": []},
    }
    finish = {"name": "Finish", "description": "End.", "parameters": {"type": "object", "properties": {}}}
    generation = {
        "query": "Rain in Oslo?",
        "function": [function, finish],
        "train_messages": [[{"role": "system", "content": "Use tools."}, {"role": "user", "content": "Rain?\nBegin!"}]],
    }
    root = {"node_type": "Action Input", "description": "", "children": list(children)}
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(
        json.dumps({"win": True, "tree": {"tree": root}, "answer_generation": generation, **changes})
    )


def read(path, tokenizer, **options):
    return read_toolbench(path, tokenizer=tokenizer, limits=Limits(None), options=ToolBenchOptions(**options))


def test_the_branch_that_led_to_the_answer_over_its_sibling(tmp_path, tokenizer):
    bad = call("rain", '{"town": "Osloo"}', observation="unknown town", code=11)
    good = thought("The name was wrong.", call("rain", '{"town":\n "Oslo"}', answer(), observation="2 mm"))
    write(tmp_path, bad, good)
    (tree,), report = read(tmp_path, tokenizer)
    assert tree.id == "1@0" and tree.tools[0]["function"]["parameters"] == {"type": "object", "properties": {}}
    assert [message["role"] for message in tree.messages] == ["system", "user"]
    assert tree.messages[1]["content"] == "Rain in Oslo?"
    assert tokenizer.decode(tree.completion_ids(0)) == (
        'The name was wrong.\n<tool_call>\n{"name": "rain", "arguments": {"town": "Oslo"}}\n</tool_call><|im_end|>\n'
    )
    assert tree.leaves[1].calls == [{"name": "rain", "arguments": {"town": "Osloo"}}]
    assert report.counts == {
        "files won": 1,
        "pairs": 1,
        "pairs: thought and call over call": 1,
        "rejected sides with errors": 1,
    }


def test_the_history_holds_calls_and_observations_of_the_way(tmp_path, tokenizer):
    branch = call("rain", '{"town": "Oslo"}', call("rain", '{"day": 1}'), answer(), observation="2 mm")
    write(tmp_path, thought("First.", thought("Then.", branch)))
    (tree,), _ = read(tmp_path / "1.json", tokenizer)
    assert tree.messages[2:] == [
        {"role": "assistant", "content": "First."},
        {
            "role": "assistant",
            "content": "Then.",
            "tool_calls": [{"type": "function", "function": {"name": "rain", "arguments": {"town": "Oslo"}}}],
        },
        {"role": "tool", "name": "rain", "content": "2 mm"},
    ]
    assert tree.leaves[0].calls[0]["name"] == "Finish" and tree.leaves[1].calls[0]["arguments"] == {"day": 1}


def test_several_siblings_make_one_tree_and_a_thought_may_be_a_reply(tmp_path, tokenizer):
    replies = [thought("I cannot."), call("rain", '{"town": "A"}'), call("rain", '{"town": "B"}', answer())]
    write(tmp_path, thought("Let me see.", *replies))
    (tree,), report = read(tmp_path, tokenizer)
    assert [(pair.chosen, pair.rejected) for pair in tree.pairs] == [(0, 1), (0, 2)]
    assert tree.leaves[0].calls[0]["arguments"] == {"town": "B"}
    assert tokenizer.decode(tree.completion_ids(1)) == "I cannot.<|im_end|>\n"
    assert tree.messages[-1] == {"role": "assistant", "content": "Let me see."}
    assert report.counts["pairs: call over thought"] == 1 and report.counts["pairs"] == 2


def test_a_second_answer_is_not_rejected(tmp_path, tokenizer):
    write(tmp_path, call("rain", "{}", answer()), call("rain", '{"town": "A"}', answer("3 mm")))
    trees, report = read(tmp_path, tokenizer)
    assert trees == [] and report.counts["pairs"] == 0


def test_everything_left_out_is_listed(tmp_path, tokenizer):
    same = call("rain", '{"town": "A"}')
    write(tmp_path, same, thought("Again.", call("rain", '{"town": "A"}', answer())), name="equal.json")
    write(tmp_path, same, call("rain", '{ "town":"A"}', answer()), name="equal_value.json")
    write(tmp_path, same, call("snow", "{}", answer()), name="unknown.json")
    write(tmp_path, call("rain", "{}", answer()), name="straight.json")
    write(tmp_path, same, name="lost.json")
    trees, report = read(tmp_path, tokenizer)
    assert trees == [] and (report.read, report.kept) == (5, 0)
    assert {entry["id"]: entry["reason"] for entry in report.dropped} == {
        "equal@0": "identical",
        "equal_value@0": "same call, written differently",
        "unknown@0": "chosen call names no tool",
        "straight": "no branch on the way to the answer",
        "lost": "no final answer",
    }


def test_arguments_that_are_no_json_stay_text(tmp_path, tokenizer):
    write(tmp_path, call("rain", '{"town": '), call("rain", "{}", answer()))
    (tree,), report = read(tmp_path, tokenizer)
    assert tree.leaves[1].calls == [{"name": "rain", "arguments": '{"town": '}]
    assert [entry["repair"] for entry in report.repaired] == ["arguments are no JSON object, kept as text"]


def test_thoughts_are_stripped_from_both_sides_and_the_history(tmp_path, tokenizer):
    good = thought("Otherwise then.", call("rain", '{"town": "Oslo"}', answer()))
    write(tmp_path, thought("First.", call("rain", "{}", thought("So."), call("rain", '{"town": "A"}'), good)))
    trees, report = read(tmp_path, tokenizer, thoughts="strip")
    (tree,) = trees
    assert [(message["role"], message["content"]) for message in tree.messages[2:]] == [
        ("assistant", ""),
        ("tool", "ok"),
    ]
    starts = [tokenizer.decode(tree.completion_ids(leaf)).partition("\n")[0] for leaf in (0, 1)]
    assert starts == ["<tool_call>", "<tool_call>"] and len(tree.leaves) == 2
    assert [entry["reason"] for entry in report.dropped] == ["a side is nothing but a thought"]
    assert report.counts["pairs: thought and call over call"] == 1
    (kept,), _ = read(tmp_path, tokenizer)
    assert len(kept.leaves) == 3 and tokenizer.decode(kept.completion_ids(0)).startswith("Otherwise then.")


def test_only_pairs_of_equal_shape(tmp_path, tokenizer):
    bad = [call("rain", '{"town": "A"}'), thought("Maybe.", call("rain", '{"town": "B"}'))]
    write(tmp_path, *bad, thought("Otherwise then.", call("rain", '{"town": "C"}', answer())))
    (tree,), report = read(tmp_path, tokenizer, shapes="equal")
    assert [leaf.calls[0]["arguments"]["town"] for leaf in tree.leaves] == ["C", "B"]
    assert [(entry["reason"], entry["detail"]) for entry in report.dropped] == [
        ("sides of different shape", "thought and call over call")
    ]
    (tree,), _ = read(tmp_path, tokenizer, shapes="equal", thoughts="strip")
    assert len(tree.leaves) == 3


@pytest.mark.parametrize(("code", "kept"), [(0, 1), (2, 1), (11, 1), (5, 0), (6, 0), (9, 0), (12, 0)])
def test_calls_that_failed_through_their_environment_can_be_left_out(tmp_path, tokenizer, code, kept):
    write(tmp_path, call("rain", '{"town": "A"}', code=code), call("rain", "{}", answer()))
    trees, report = read(tmp_path, tokenizer, failures="skip")
    assert len(trees) == kept
    assert [entry["detail"] for entry in report.dropped] == [f"code {code}"] * (1 - kept)
    assert len(read(tmp_path, tokenizer)[0]) == 1


def test_files_that_are_refused_can_be_gone_over(tmp_path, tokenizer):
    write(tmp_path, call("rain", '{"town": "A"}'), call("rain", "{}", answer()), name="b.json")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "c.json").write_text("{")
    errors: list[InputError] = []
    trees, report = read_toolbench(tmp_path, tokenizer=tokenizer, limits=Limits(None), on_error=errors.append)
    assert len(trees) == 1 and report.read == 3
    assert [str(error).partition(": ")[0] for error in errors] == [f"{tmp_path / 'a.json'}", f"{tmp_path / 'c.json'}:1"]


@pytest.mark.parametrize(
    ("children", "changes", "message"),
    [
        ([], {"answer_generation": {"query": "x"}}, "not a ToolBench answer tree: KeyError: 'function'"),
        ([], {"tree": [1]}, "not a ToolBench answer tree"),
        ([{"node_type": "Guess", "description": "", "children": []}], {}, "unknown type 'Guess'"),
        ([{"node_type": "Action", "description": "", "children": []}], {}, "an Action must have one child"),
    ],
)
def test_files_of_another_kind(tmp_path, tokenizer, children, changes, message):
    write(tmp_path, *children, **changes)
    with pytest.raises(InputError, match=f"1.json: .*{message}"):
        read(tmp_path, tokenizer)


def test_empty_folder_and_broken_file(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"no \*.json file in the folder"):
        read(tmp_path, tokenizer)
    (tmp_path / "a.json").write_text('{"tree": {},\n x}')
    with pytest.raises(InputError, match=r"a\.json:2: broken JSON"):
        read(tmp_path, tokenizer)


def test_real_answer_trees(real_data, tokenizer):
    trees, report = read(real_data / "toolbench" / "answer", tokenizer)
    assert (report.read, report.counts["files won"], report.counts["pairs"]) == (15, 9, 6)
    assert report.to_dict()["dropped_by_reason"] == {
        "no branch on the way to the answer": 5,
        "no final answer": 6,
        "identical": 1,
        "same call, written differently": 1,
    }
    assert report.counts["pairs: thought and call over call"] == 5
    assert report.repaired == []
    assert len(trees) == report.kept == 4 and len({tree.id for tree in trees}) == 4
    for tree in trees:
        assert len(tree.leaves) == 2 and tree.leaves[0].calls != tree.leaves[1].calls
        assert tokenizer.decode(tree.completion_ids(0)).endswith("</tool_call><|im_end|>\n")
        assert tree.tools[-1]["function"]["name"] == "Finish"


def test_real_answer_trees_without_what_tells_the_sides_apart(real_data, tokenizer):
    """The published trees show it: of four pairs, three have a thought on the chosen side only."""
    path = real_data / "toolbench" / "answer"
    trees, report = read(path, tokenizer, shapes="equal")
    assert len(trees) == 1 and report.to_dict()["dropped_by_reason"]["sides of different shape"] == 3
    trees, _ = read(path, tokenizer, thoughts="strip", shapes="equal")
    assert len(trees) == 4
    for tree in trees:
        text = [tokenizer.decode(tree.completion_ids(leaf)) for leaf in range(len(tree.leaves))]
        assert all(t.startswith("<tool_call>") for t in text)
