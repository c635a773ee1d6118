"""The command: dialogues in, run folder out."""

from __future__ import annotations

import json

import pytest
from hesitant import asking, calling

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
    assert "exact calls" in capsys.readouterr().out
    main(["--config", str(tmp_path / "out/run/config.yaml")])


def test_what_the_user_has_to_change(arguments, capsys):
    with pytest.raises(InputError, match="max_new_tokens must be at least 1"):
        main([*arguments, "--max_new_tokens", "0"])
    with pytest.raises(InputError, match="call no tool within --max_length"):
        main([*arguments, "--max_length", "10"])
    with pytest.raises(SystemExit):
        run_command(main, ["--model", "nowhere"])
    assert "--data is required" in capsys.readouterr().err
