from __future__ import annotations

import json

import pytest

from ttpa.data.__main__ import main
from ttpa.data.doctor import check_file, summary
from ttpa.data.doctor_table import NUM_ERRORS, checkup_table
from ttpa.data.read import read_data
from ttpa.trees.io import write_trees
from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions

RAIN = {
    "type": "function",
    "function": {
        "name": "rain",
        "description": "Rain of a day.",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string"},
                "days": {"type": "integer", "default": 1},
                "unit": {"type": "string", "enum": ["mm", "inch"]},
            },
            "required": ["town"],
        },
    },
}
ASKED = [{"role": "user", "content": "Rain in Oslo?"}]
RESULT = "<|im_end|>\n<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


def calls(*arguments, name="rain"):
    made = [{"type": "function", "function": {"name": name, "arguments": a}} for a in arguments]
    return {"role": "assistant", "content": "", "tool_calls": made}


def row(chosen, rejected, **more):
    return {"prompt": ASKED, "chosen": [chosen], "rejected": [rejected], "tools": [RAIN], **more}


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


OTHER = [{"role": "user", "content": "Rain there?"}]


def found(checkup):
    return [(entry["id"], entry["finding"]) for entry in checkup.findings]


def tree(tokenizer, *texts, trained=None, **more):
    """The first text preferred to each of the others; `trained` is a text whose tokens the model did not write."""
    completions = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        masked = None
        if trained is not None and trained in text:
            before = len(tokenizer(text[: text.index(trained)])["input_ids"])
            masked = [int(not before <= i < before + len(tokenizer(trained)["input_ids"])) for i in range(len(ids))]
        completions.append(Completion(ids, Leaf(-1, "given"), trained=masked))
    nodes, leaves = merge_completions(completions)
    pairs = [Pair(0, leaf) for leaf in range(1, len(texts))]
    return PreferenceTree("t", tokenizer("Rain?")["input_ids"], nodes, leaves, pairs, **more)


def check_trees(tmp_path, tokenizer, *trees):
    write_trees(tmp_path / "trees.jsonl", trees)
    return check_file(tmp_path / "trees.jsonl", tokenizer=tokenizer, max_length=None)


def test_rows_tokens_and_lengths_are_counted(tmp_path, tokenizer):
    rows = [{"prompt": f"The sky {i}", "chosen": " blue", "rejected": " green"} for i in (10, 11, 12)]
    checkup = check_file(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer, max_length=None)
    assert (checkup.holds, checkup.errors, checkup.findings) == ("preferences", [], [])
    assert (checkup.report.read, checkup.report.kept, checkup.report.counts) == (3, 3, {"pairs kept": 3})
    assert checkup.lengths == {"prompt": [10] * 3, "completion": [6, 7] * 3, "whole": [17] * 3}
    # the space is shared by both sides; each of them ends with a token of its own
    counts = {name: count for name, count in checkup.tokens.items() if count}
    assert counts == {"prompt": 30, "text": 3 * (1 + 4 + 5), "end_of_turn": 6}


def test_a_summary_of_lengths():
    lengths = [*range(1, 101)]
    told = summary(lengths[::-1])
    assert (told["number"], told["least"], told["median"], told["95 %"], told["most"]) == (100, 1, 50, 95, 100)
    assert told["histogram"] == {"1": 1, "2": 1, "4": 2, "8": 4, "16": 8, "32": 16, "64": 32, "128": 36}
    assert summary([7])["95 %"] == 7


def test_every_row_that_a_run_refuses_is_listed_with_its_line(tmp_path, tokenizer):
    unknown = row(calls({}, name="snow"), calls({}))
    rows = [row(calls({"town": "Oslo"}), calls({})), *[unknown] * (NUM_ERRORS + 5)]
    checkup = check_file(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer, max_length=None)
    assert [error.split(": ")[0] for error in checkup.errors] == [f"{tmp_path}/a.jsonl:{n}" for n in range(2, 27)]
    assert "'snow', which names no tool" in checkup.errors[0] and checkup.report.kept == 1
    table = checkup_table(checkup)
    assert "errors: 25\n" in table and "a.jsonl:21: " in table and "a.jsonl:22: " not in table
    assert table.endswith("and 5 more, which --json FILE lists")


def test_rejected_sides_that_are_right_after_normalisation(tmp_path, tokenizer):
    gold = calls({"town": "Oslo", "unit": "mm"}, {"town": "Bergen"})
    other = {"equal": [{"unit": "mm", "town": "Oslo"}, {"town": "Bergen"}]}  # another order of keys
    other |= {"order": [{"town": "Bergen"}, {"town": "Oslo", "unit": "mm"}]}
    other |= {"default": [{"town": "Oslo", "unit": "mm", "days": 1.0}, {"town": "Bergen"}]}
    other |= {"near": [{"town": "oslo", "unit": "mm"}, {"town": " Bergen"}]}
    other |= {"wrong": [{"town": "Bergen", "unit": "mm"}, {"town": "Bergen"}], "fewer": [{"town": "Bergen"}]}
    rows = [row(gold, calls(*arguments), id=id) for id, arguments in other.items()]
    rows.append(row(gold, {"role": "assistant", "content": "I cannot."}, id="no call"))
    checkup = check_file(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer, max_length=None)
    same = "rejected side makes the chosen calls"
    assert found(checkup) == [
        ("equal", same),
        ("order", same),
        ("default", same),
        ("near", f"{same} but for case and punctuation"),
    ]
    assert [entry["where"] for entry in checkup.findings] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 2, 3, 4)]


def test_a_rejected_text_that_says_the_same(tmp_path, tokenizer):
    says = [{"role": "assistant", "content": text} for text in ("It rains.", "It does not.")]
    checkup = check_file(write(tmp_path / "a.jsonl", [row(*says)]), tokenizer=tokenizer, max_length=None)
    assert found(checkup) == []  # a pair of texts has no calls to compare


def test_calls_that_name_no_tool_and_calls_that_are_no_json(tmp_path, tokenizer):
    gold = calls({"town": "Oslo"})
    rows = [row(gold, calls({}, name="snow"), id="name"), row(gold, calls('{"town": '), id="text")]
    rows.append(row(gold, calls({"town": 5}), id="type"))  # a wrong call is what a rejected side is for
    rows.append(row(calls({"town": 7}), gold, id="chosen"))
    history = [*ASKED, calls({}, '{"town": ', name="hail"), {"role": "tool", "content": "none"}]
    rows.append(row(gold, calls({}), id="prompt", prompt=history))
    checkup = check_file(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer, max_length=None)
    assert checkup.errors == []
    assert found(checkup) == [
        ("name", "rejected call names no tool of the list"),
        ("text", "rejected call is not valid JSON"),
        ("chosen", "chosen call breaks its schema"),
        ("prompt", "prompt call is not valid JSON"),
        ("prompt", "prompt call names no tool of the list"),
    ]
    assert checkup.findings[2]["detail"] == "rain /town: value.type"


def test_calls_in_plain_texts_are_read(tmp_path, tokenizer):
    right = '<tool_call>\n{"name": "rain", "arguments": {"town": "Oslo"}}\n</tool_call>'
    rejected = {"broken": right.replace("}}", ""), "spaces": right.replace(": ", ":"), "wrong": right.replace("O", "o")}
    rows = [{"id": id, "prompt": "Rain?", "chosen": right, "rejected": text} for id, text in rejected.items()]
    checkup = check_file(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer, max_length=None)
    assert found(checkup) == [
        ("broken", "rejected call is not valid JSON"),
        ("spaces", "rejected side makes the chosen calls"),
        ("wrong", "rejected side makes the chosen calls but for case and punctuation"),
    ]


def test_tools_that_are_no_json_schema_are_told_and_nothing_is_checked_against_them(tmp_path, tokenizer):
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "dict", "properties": {}}}}]
    rows = [row(calls({"town": "Oslo"}), calls({"town": 1.0}), tools=tools)]
    checkup = check_file(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer, max_length=None)
    assert found(checkup) == [("a:1", "calls cannot be checked against the tools")]
    assert "'rain': parameters must have the type" in checkup.findings[0]["detail"]


def test_pairs_that_come_again_and_pairs_that_come_the_other_way_round(tmp_path, tokenizer):
    one, two = calls({"town": "Oslo"}), calls({"town": "Rome"})
    rows = [row(one, two, id="a"), row(one, two, id="b"), row(two, one, id="c"), row(one, two, id="d", prompt=OTHER)]
    checkup = check_file(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer, max_length=None)
    assert found(checkup) == [("b", "pair comes twice"), ("c", "pair comes the other way round as well")]
    assert [entry["detail"] for entry in checkup.findings] == ["a", "a"]


def test_forks_in_a_tool_result_and_elsewhere_where_the_model_does_not_write(tmp_path, tokenizer):
    call = '<tool_call>\n{"name": "rain", "arguments": {}}\n</tool_call>'
    one, two = call + RESULT.format("1 mm"), call + RESULT.format("2 mm")
    made = tree(tokenizer, one + "One.", two + "Two.")
    for node in made.nodes:
        text = tokenizer.decode(node.ids)
        if call in text:  # what both share, up to the numbers
            node.trained = [1] * len(tokenizer(call)["input_ids"])
            node.trained += [0] * (len(node.ids) - len(node.trained))
        else:
            node.trained = [0] * (len(node.ids) - 4) + [1] * 4
    checkup = check_trees(tmp_path, tokenizer, made)
    assert found(checkup) == [("t", "fork inside a tool result")] and checkup.errors == []
    assert checkup.tokens["tool_result"] > 0

    made.nodes[1].trained = made.nodes[2].trained = None
    checkup = check_trees(tmp_path, tokenizer, made)
    assert [error.split(": ", 1)[1] for error in checkup.errors] == [
        "'t': tokens of a tool's result would be trained; set `trained` to 0 for them"
    ]

    checkup = check_trees(tmp_path, tokenizer, tree(tokenizer, "It rains. A", "It rains. B", trained="A"))
    assert found(checkup) == []  # one side's token is the model's choice
    for node in made.nodes[1:]:
        node.trained = [0] * len(node.ids)
    checkup = check_trees(tmp_path, tokenizer, made)
    assert ("t", "nothing that the model wrote differs") in found(checkup)


def test_sides_that_part_in_a_header(tmp_path, tokenizer):
    header = "<|im_end|>\n<|im_start|>user\n"
    checkup = check_trees(tmp_path, tokenizer, tree(tokenizer, f"Ah.{header}", "Ah.", trained=header))
    assert found(checkup) == [
        ("t", "fork where the model does not write"),
        ("t", "nothing that the model wrote differs"),
    ]


def test_sides_that_read_the_same_in_other_tokens(tmp_path, tokenizer):
    made = tree(tokenizer, "Oh", "Ah")
    tag = tokenizer("<tools>")["input_ids"]
    spelled = tokenizer.convert_tokens_to_ids([*"<tools>"])
    assert len(tag) == 1 and len(spelled) == 7
    made.nodes[0].ids, made.nodes[1].ids = tag, spelled
    assert found(check_trees(tmp_path, tokenizer, made)) == [("t", "both sides read the same, in other tokens")]


def test_trees_of_another_tokenizer_and_trees_without_a_pair(tmp_path, tokenizer):
    alone = tree(tokenizer, "Oh")
    checkup = check_trees(tmp_path, tokenizer, alone, tree(tokenizer, "Oh", "Ah"))
    assert [entry["reason"] for entry in checkup.report.dropped] == ["no pair"] and checkup.report.kept == 1
    checkup = check_trees(tmp_path, tokenizer, alone)
    assert checkup.errors == [f"{tmp_path}/trees.jsonl: no pair is left, and there is nothing to train on"]
    alone.nodes[0].ids[-1] = len(tokenizer)
    checkup = check_trees(tmp_path, tokenizer, alone)
    assert len(checkup.errors) == 1 and f"token {len(tokenizer)} is in a tree" in checkup.errors[0]


@pytest.mark.parametrize("max_length", [None, 17, 16, 5])
def test_what_train_leaves_out_is_what_reading_for_it_leaves_out(tmp_path, tokenizer, max_length):
    rows = [
        {"id": "a", "prompt": "The sky is", "chosen": " blue", "rejected": " green"},
        {"id": "b", "prompt": "Grass is", "chosen": " green", "rejected": " green"},
        {"id": "c", "prompt": "Snow is", "chosen": " white", "rejected": " blue"},
    ]
    file = write(tmp_path / "a.jsonl", rows)
    trees, report = read_data(file, tokenizer=tokenizer, max_length=max_length)
    checkup = check_file(file, tokenizer=tokenizer, max_length=max_length)

    def by_id(entries):
        return sorted(entries, key=lambda entry: entry["id"])

    assert by_id(checkup.report.dropped) == by_id(report.dropped)
    assert checkup.report.kept == len(trees)
    assert bool(checkup.errors) == (not trees)
    assert len(checkup.lengths["whole"]) == 2  # those that are too long are measured too


def dialogue(id, *messages):
    return {"id": id, "tools": [RAIN], "messages": [*ASKED, *messages]}


def on_disk(message):
    for call in message["tool_calls"]:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return message


def test_dialogues_are_checked_as_sample_takes_them(tmp_path, tokenizer):
    result = {"role": "tool", "content": "2 mm"}
    asks = dialogue("a", on_disk(calls({"town": "Oslo"})), result, on_disk(calls({"town": "Oslo", "unit": "km"})))
    talks = dialogue("b", {"role": "assistant", "content": "Where?"})
    bad = dialogue("c", on_disk(calls({}, name="snow")))
    file = write(tmp_path / "d.jsonl", [asks, talks, bad])
    checkup = check_file(file, tokenizer=tokenizer, max_length=None)
    assert checkup.report.counts == {"dialogues": 2, "decisions": 2, "calls": 2} and checkup.report.kept == 1
    assert [(entry["id"], entry["reason"]) for entry in checkup.report.dropped] == [("b", "no tool is called")]
    assert found(checkup) == [("a", "gold call breaks its schema")]
    assert len(checkup.errors) == 1 and checkup.errors[0].startswith(f"{file}:3: ")
    assert len(checkup.lengths["completion"]) == 2 and checkup.tokens["end_of_turn"] == 2

    limit = checkup.lengths["whole"][0]
    checkup = check_file(file, tokenizer=tokenizer, max_length=limit)
    assert [(entry["id"], entry["reason"]) for entry in checkup.report.dropped] == [
        ("a:3", "over max_length"),
        ("b", "no tool is called"),
    ]
    file = write(tmp_path / "e.jsonl", [talks])
    checkup = check_file(file, tokenizer=tokenizer, max_length=None)
    assert checkup.errors == [f"{file}: no dialogue calls a tool, so there is no gold answer to compare with"]


def test_the_rows_of_other_formats_are_named_with_their_line(tmp_path, tokenizer):
    tools = [{"name": "rain", "description": "", "parameters": {"town": {"type": "str", "description": "Where."}}}]
    answers = [[{"name": "rain", "arguments": {"town": town}}] for town in ("Oslo", 5)]
    rows = [{"id": i, "query": "Rain?", "tools": tools, "answers": json.dumps(a)} for i, a in enumerate(answers)]
    checkup = check_file(write(tmp_path / "x.jsonl", rows), tokenizer=tokenizer, max_length=None)
    assert [(entry["where"], entry["finding"]) for entry in checkup.findings] == [
        (f"{tmp_path}/x.jsonl:2", "gold call breaks its schema")
    ]
    assert "type words read as JSON Schema" in checkup_table(checkup)


def test_a_chat_template_that_drops_the_tools(tmp_path, tokenizer):
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    other.chat_template = tokenizer.chat_template.replace("tools", "nothing")
    file = write(tmp_path / "d.jsonl", [dialogue("a", on_disk(calls({"town": "Oslo"})))])
    checkup = check_file(file, tokenizer=other, max_length=None)
    assert len(checkup.errors) == 1 and "drops the tools" in checkup.errors[0]


def test_a_benchmark_is_no_training_data(tmp_path, tokenizer):
    function = {"name": "rain", "description": "", "parameters": {"type": "dict", "properties": {}, "required": []}}
    questions = [{"id": f"simple_python_{i}", "question": [ASKED], "function": [function]} for i in range(2)]
    (tmp_path / "possible_answer").mkdir()
    answers = [{"id": question["id"], "ground_truth": [{"rain": {}}]} for question in questions]
    write(tmp_path / "possible_answer" / "q.json", answers)
    file = write(tmp_path / "q.json", questions)
    for path in (file, tmp_path):
        checkup = check_file(path, tokenizer=tokenizer, max_length=None)
        assert (checkup.holds, checkup.errors, checkup.report.kept) == ("evaluation", [], 2)
        assert "nothing may be trained" in checkup.report.notes[0]
    write(tmp_path / "possible_answer" / "q.json", answers[:1])
    checkup = check_file(file, tokenizer=tokenizer, max_length=None)
    assert len(checkup.errors) == 1 and "no possible answer to 'simple_python_1'" in checkup.errors[0]
    write(file, [questions[0], {**questions[1], "function": 5}, {**questions[1], "question": []}])
    checkup = check_file(file, tokenizer=tokenizer, max_length=None)
    assert [error.split(": ")[0] for error in checkup.errors] == [f"{file}:2", f"{file}:3"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", '{"text": "x"}', "rows of an unknown format"),
        ("a.jsonl", '{"prompt": "x", "chosen": "y", "rejected": "z"}\n{"prompt": ', "a.jsonl:2: broken JSON"),
        ("a.jsonl", '{"id": "t", "prompt_ids": [1], "nodes": [], "leaves": [], "pairs": [1]}', "a.jsonl:1: pairs"),
    ],
)
def test_files_that_cannot_be_read_to_their_end(tmp_path, tokenizer, name, text, message):
    (tmp_path / name).write_text(text)
    checkup = check_file(tmp_path / name, tokenizer=tokenizer, max_length=None)
    assert len(checkup.errors) == 1 and message in checkup.errors[0]
    assert message in checkup_table(checkup)


def test_real_answer_trees(real_data, tokenizer):
    checkup = check_file(real_data / "toolbench" / "answer", tokenizer=tokenizer, max_length=None)
    assert (checkup.holds, checkup.errors) == ("toolbench", [])
    assert (checkup.report.read, checkup.report.kept, checkup.report.counts["pairs kept"]) == (15, 4, 4)
    assert checkup.tokens["tool_name"] > 0


def exit_code(*words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


def test_the_command_prints_a_table_writes_json_and_tells_errors_by_its_exit_code(tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", [row(calls({"town": "Oslo"}), calls({"town": "oslo"}))])
    bad = write(
        tmp_path / "bad.jsonl", [{"prompt": "The sky is", "chosen": " blue", "rejected": " red"}, {"prompt": "a"}]
    )
    main(["check", str(good)])
    printed = capsys.readouterr().out
    assert printed.startswith("tokens are those of the embedded model, as no --model is given; max_length is 8192\n")
    assert "rejected side makes the chosen calls but for case and punctuation" in printed
    assert printed.endswith("files: 1, errors: 0\n")

    assert exit_code("check", good, "--max_length", "4096", bad, "--json", tmp_path / "made" / "check.json") == 1
    assert capsys.readouterr().out.endswith("files: 2, errors: 1\n")
    record = json.loads((tmp_path / "made" / "check.json").read_text())
    assert (record["max_length"], record["num_errors"]) == (4096, 1)
    assert [part["path"] for part in record["files"]] == [str(good), str(bad)]
    first, second = record["files"]
    assert first["findings_by_kind"] == {"rejected side makes the chosen calls but for case and punctuation": 1}
    assert second["errors"][0].startswith(f"{bad}:2: ") and second["report"]["read"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command is given; write python -m ttpa.data check FILE..."),
        (["chekc", "a"], "unknown command 'chekc': did you mean python -m ttpa.data check"),
        (["check"], "no file is given"),
        (["check", "none.jsonl"], "none.jsonl: no such file"),
        (["check", "x", "--max_lenght", "5"], "unknown option --max_lenght: did you mean --max_length"),
        (["check", "x", "--max_length", "1"], "--max_length must be at least 2, not 1"),
        (["check", "x", "--json"], "--json needs a value"),
    ],
)
def test_bad_usage(words, message):
    with pytest.raises(ValueError, match=message):
        main(words)


def test_help(capsys):
    assert exit_code("--help") == 0 and exit_code("check", "--help") == 0
    assert capsys.readouterr().out.count("python -m ttpa.data check FILE... [--config FILE]") == 2
