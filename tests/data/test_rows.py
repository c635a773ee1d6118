from __future__ import annotations

import json

import pytest

from ttpa.data.rows import iterate_rows
from ttpa.errors import InputError

ROWS = [{"a": 1, "b": ["x"]}, {"a": 2, "b": []}]


def test_the_same_rows_in_every_kind_of_file(tmp_path):
    from datasets import Dataset

    lines = "\n".join(map(json.dumps, ROWS))
    texts = {"a.jsonl": lines, "a.ndjson": lines, "lines.json": lines, "array.json": json.dumps(ROWS)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert [row for _, row in iterate_rows(tmp_path / name)] == ROWS
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    assert list(iterate_rows(tmp_path / "a.parquet")) == [(1, ROWS[0]), (2, ROWS[1])]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.csv", r"a\.csv: \.csv files are not read; the data must be \.jsonl, \.ndjson, \.json, \.parquet"),
        ("data", "data: a file without a suffix is not read"),
        ("none.parquet", "no such file"),
        ("none", "no such file"),
        ("broken.parquet", "no readable Parquet file"),
    ],
)
def test_files_that_are_not_read(tmp_path, name, message):
    if not name.startswith("none"):
        (tmp_path / name).write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=message):
        list(iterate_rows(tmp_path / name))
