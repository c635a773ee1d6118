from __future__ import annotations

import pytest

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
    ("text", "line"),
    [('[{"a": 1}\n{"b": 2}]', 2), ('[{"a": 1}', 1), ('[{"a": 1},\n\n{"b" 2}]', 3)],
)
def test_broken_array(tmp_path, text, line):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(InputError, match=f"a.json:{line}: broken JSON"):
        list(read_json_values(file))


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
