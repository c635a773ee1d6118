"""The rows of a data file, whatever kind of file it is, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ttpa.data.jsonl import read_json_lines, read_json_values
from ttpa.errors import InputError, OnError

LINES = (".jsonl", ".ndjson")


def iterate_rows(path: Path, *, on_error: OnError | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line (in Parquet the row), from 1, and the record of every row of a .parquet file, of a .json file (one
    array, or object after object), or of JSON Lines (.jsonl, .ndjson), a few of them in memory at a time; raises
    InputError for a missing or broken file, and for one of another kind. Where `on_error` is given, it is called for a
    broken line of JSON Lines instead, and the next one is read."""
    if path.suffix in LINES:
        return read_json_lines(path, on_error=on_error)
    if path.suffix == ".json":
        return read_json_values(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if not path.exists():
        raise InputError("no such file", path=path)
    kind = f"{path.suffix} files are" if path.suffix else "a file without a suffix is"
    raise InputError(f"{kind} not read; the data must be {', '.join(LINES)}, .json, .parquet", path=path)


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from datasets import load_dataset  # takes seconds to import, and only Parquet needs it

    if not path.is_file():
        raise InputError("no such file", path=path)
    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from enumerate(map(dict, rows), start=1)
    except Exception as error:  # pyarrow and datasets raise what they like for a broken file
        raise InputError(f"no readable Parquet file: {error}", path=path) from None
