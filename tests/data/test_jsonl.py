from __future__ import annotations

import json
import random
import tracemalloc

import pytest

from ttpa.data import jsonl
from ttpa.data.jsonl import read_json, read_json_lines, read_json_values, write_json_lines
from ttpa.errors import InputError


def test_lines_keep_their_numbers(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"b": "\xe2\x80\xa8"}\r\n')
    assert list(read_json_lines(file)) == [(1, {"a": 1}), (4, {"b": "\u2028"})]


def test_values_of_an_array_and_of_objects_over_several_lines(tmp_path):
    file = tmp_path / "a.json"
    for text in ('\n[{"a": 1},\n\n {"b":\n 2}\n]\n', '\n{"a": 1}\n\n {"b":\n 2}'):
        file.write_text(text)
        assert list(read_json_values(file)) == [(2, {"a": 1}), (4, {"b": 2})]
    for text in ("", "[]", " [ ] "):
        file.write_text(text)
        assert list(read_json_values(file)) == []


@pytest.mark.parametrize("reader", [read_json_lines, read_json_values])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a" 2}\n', ":2: broken JSON: "),
        ('{"a": 1}\n3\n', ":2: expected a JSON object, found int"),
        ("[" * 200_000, "broken JSON: nested too deeply"),
    ],
)
def test_broken_text(tmp_path, reader, text, message):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        list(reader(file))
    assert message.removesuffix(" ") in str(error.value) and str(error.value).startswith(f"{file}:")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[{"a": 1}\n{"b": 2}]', 2, "the list goes on without a comma (column 1)"),
        ('[{"a": 1}\n ', 2, "the list is not closed (column 2)"),
        ('[{"a": 1},\n]', 2, "a comma, and no value after it (column 1)"),
        ('[{"a": 1}]\n{}', 2, "text after the list (column 1)"),
        ('[{"a": 1},\n\n {"b" 2}]', 3, "Expecting ':' delimiter (column 7)"),
        ('[{"a":\n "\u2028é', 2, "Unterminated string starting at (column 2)"),
        ('[{"a": "\n"}]', 1, "Invalid control character at (column 9)"),
        ('{"a": [1,\n  2', 2, "Expecting ',' delimiter (column 4)"),
        ("[", 1, "the list is not closed (column 2)"),
    ],
)
def test_a_broken_file_is_named_by_line_and_column(tmp_path, text, line, message):
    file = tmp_path / "a.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as error:
        list(read_json_values(file))
    assert str(error.value) == f"{file}:{line}: broken JSON: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1', "Expecting ',' delimiter (column 8)"),
        ('  {"a" 1}', "Expecting ':' delimiter (column 8)"),
        ('{"a": 1} x', "Extra data (column 10)"),
        ('{"a": 1}\u00a0', "Extra data (column 9)"),
        ('{"é', "Unterminated string starting at (column 2)"),
    ],
)
def test_a_broken_line_is_named_by_its_column(tmp_path, text, message):
    file = tmp_path / "a.jsonl"
    file.write_text(f'\ufeff{{"a": 1}}\n\n{text}\n{{"a": 1}}\n', encoding="utf-8")
    with pytest.raises(InputError) as error:
        list(read_json_lines(file))
    assert str(error.value) == f"{file}:3: broken JSON: {message}"


def test_where_the_file_is_cut_into_pieces_makes_no_difference(tmp_path, monkeypatch):
    rng, file = random.Random(0), tmp_path / "a.json"
    records = [{"a": [1.5e-3, True, None], "é\n": {"x": 'a "b" \\ \u2028 😀'}}, {"b": -12}, {}, {"c": "x" * 30}]

    def outcome(size: int) -> list:
        monkeypatch.setattr(jsonl, "CHUNK", size)
        found: list = []
        try:
            for row in read_json_values(file):
                found.append(row)
        except InputError as error:
            found.append(str(error))
        return found

    for case in range(60):
        text = json.dumps(records, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
        if case % 2:
            text = "\n".join(json.dumps(record, indent=rng.choice([None, 2])) for record in records)
        at = rng.randrange(len(text))
        damaged = text[:at] + rng.choice(['"', ",", "}", "\n", ""]) + text[at + 1 :]
        for written in (text, damaged, text[:at]):
            file.write_text(written, encoding="utf-8")
            whole = outcome(1 << 20)
            assert written != text or [row for _, row in whole] == records
            assert outcome(1) == outcome(7) == whole


def test_a_long_array_is_not_held_in_memory(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"text": "x" * 1000}] * 12_000))
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_json_values(file))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 12_000 and peak < 6e6 < file.stat().st_size


@pytest.mark.parametrize("reader", [read_json, lambda path: list(read_json_lines(path))])
def test_unreadable_files(tmp_path, reader):
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        reader(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        reader(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8"):
        reader(tmp_path / "latin.jsonl")


def test_read_json_names_the_line(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1,\n "b" 2}')
    with pytest.raises(InputError, match=r"a.json:2: broken JSON: .*column 6"):
        read_json(tmp_path / "a.json")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "new" / "a.jsonl"
    write_json_lines(file, [{"a": "é"}])
    assert file.read_text(encoding="utf-8") == '{"a": "é"}\n'
    with pytest.raises(TypeError):
        write_json_lines(file, [{"a": 1}, {"a": object()}])
    assert list(read_json_lines(file)) == [(1, {"a": "é"})]
    assert [path.name for path in file.parent.iterdir()] == ["a.jsonl"]
