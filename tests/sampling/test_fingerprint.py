"""Fingerprints change with what they stand for and with nothing else."""

from __future__ import annotations

import json

from hesitant import asking

from ttpa.data.dialogues import write_dialogues
from ttpa.data.read import read_dialogues
from ttpa.sampling.fingerprint import hash_of_dialogues


def test_the_hash_of_dialogues_depends_on_what_they_say_and_not_on_how_the_file_is_written(tmp_path):
    dialogues = [asking("a", "Rome"), asking("b", "Oslo")]
    write_dialogues(tmp_path / "a.jsonl", dialogues)
    lines = [json.dumps(json.loads(line)) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    (tmp_path / "b.jsonl").write_text("\n\n".join(lines))
    assert hash_of_dialogues(read_dialogues(tmp_path / "a.jsonl")[0]) == hash_of_dialogues(dialogues)
    assert hash_of_dialogues(read_dialogues(tmp_path / "b.jsonl")[0]) == hash_of_dialogues(dialogues)
    assert hash_of_dialogues(dialogues[::-1]) != hash_of_dialogues(dialogues)
