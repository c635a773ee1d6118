"""The command: dialogues or questions in, run folder out."""

from __future__ import annotations

import json

import pytest
from hesitant import asking, calling
from ranks import run_ranks

from ttpa.config import run_command
from ttpa.data.dialogues import write_dialogues
from ttpa.errors import InputError
from ttpa.evaluate import main


@pytest.fixture
def arguments(tokenizer, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_dialogues(tmp_path / "data.jsonl", [asking("a", "Rome"), asking("b", "Oslo", calling("time"))])
    options = ["--model", "model", "--data", "data.jsonl", "--output", "out/run"]
    return [*(str(tmp_path / x) if "-" not in x else x for x in options), "--max_new_tokens", "4"]


def test_run_folder(arguments, tmp_path, capsys):
    main(arguments)
    summary = json.loads((tmp_path / "out/run/summary.json").read_text())
    assert (summary["decisions"], summary["exact_calls"], summary["errors"]) == (2, 0, {"no_call": 2})
    assert summary["seconds"] > 0 and summary["exact_interval"][0] == 0.0
    rows = [json.loads(line) for line in (tmp_path / "out/run/outcomes.jsonl").read_text().splitlines()]
    assert [(row["id"], row["codes"]) for row in rows] == [("a:1", ["no_call"]), ("b:1", ["no_call"])]
    assert json.loads((tmp_path / "out/run/data_report.json").read_text())["read"] == 2
    assert "exact calls" in capsys.readouterr().out
    main(["--config", str(tmp_path / "out/run/config.yaml")])


def test_two_processes_find_what_one_finds(arguments, tmp_path):
    main(arguments)
    one = (tmp_path / "out/run/outcomes.jsonl").read_text()
    run_ranks(main, 2, [*arguments, "--output", str(tmp_path / "two")])
    assert (tmp_path / "two/outcomes.jsonl").read_text() == one and one.count("\n") == 2
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "config.yaml",
        "data_report.json",
        "outcomes.jsonl",
        "summary.json",
    ]


def test_a_benchmark_by_its_file_and_by_its_folder(arguments, tmp_path, capsys):
    function = {"name": "rain", "description": "", "parameters": {"type": "dict", "properties": {}, "required": []}}
    asks = [[{"role": "user", "content": "Rain?"}]]
    folder = tmp_path / "bfcl"
    (folder / "possible_answer").mkdir(parents=True)
    for category, answer in (("irrelevance", None), ("simple_python", [{"rain": {}}])):
        id, name = f"{category}_0", f"BFCL_v4_{category}.json"
        (folder / name).write_text(json.dumps({"id": id, "question": asks, "function": [function]}))
        if answer is not None:
            (folder / "possible_answer" / name).write_text(json.dumps({"id": id, "ground_truth": answer}))
    main([*arguments, "--data", str(folder)])
    summary = json.loads((tmp_path / "out/run/summary.json").read_text())
    assert (summary["benchmark"], summary["decisions"], summary["exact_calls"]) == ("bfcl", 2, 1)
    assert summary["groups"] == {"non_live": {"mean": 0.0, "categories": ["simple_python"]}}
    assert summary["splits"]["irrelevance"]["exact_calls"] == 1
    assert "non_live mean of simple_python: 0.0 %" in capsys.readouterr().out
    main([*arguments, "--data", str(folder / "BFCL_v4_irrelevance.json")])
    assert json.loads((tmp_path / "out/run/summary.json").read_text())["exact_share"] == 1.0


def test_what_the_user_has_to_change(arguments, tmp_path, capsys):
    with pytest.raises(InputError, match="max_new_tokens must be at least 1"):
        main([*arguments, "--max_new_tokens", "0"])
    with pytest.raises(InputError, match="no tool is called within --max_length"):
        main([*arguments, "--max_length", "10"])
    with pytest.raises(InputError, match="dialogues are read from a file; this is a folder without questions of BFCL"):
        main([*arguments, "--data", str(tmp_path / "model")])
    with pytest.raises(InputError, match="unknown dialect 'hermmes': did you mean hermes"):
        main([*arguments, "--dialect", "hermmes"])
    with pytest.raises(SystemExit):
        run_command(main, ["--model", "nowhere"])
    assert "--data is required" in capsys.readouterr().err
