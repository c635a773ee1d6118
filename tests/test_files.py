from __future__ import annotations

import json

import pytest

from ttpa.errors import InputError
from ttpa.files import atomic_write


def test_the_name_appears_at_the_end_and_only_when_all_went_well(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as file:
        file.write("é")
        assert not path.exists()
    assert path.read_bytes() == "é".encode()
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write("half")
        raise KeyError
    assert path.read_text(encoding="utf-8") == "é"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_a_lone_surrogate_survives_in_json(tmp_path):
    with atomic_write(tmp_path / "a.json") as file:
        file.write(json.dumps({"a": "\ud800é"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": "\ud800é"}


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.txt", tmp_path):
        with pytest.raises(InputError, match="cannot be written"), atomic_write(path) as file:
            file.write("x")
