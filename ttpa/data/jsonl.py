"""Records in JSON files: reading with line numbers, writing through a temporary name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ttpa.errors import InputError
from ttpa.files import atomic_write


def read_text(path: Path | str) -> str:
    """The text of a UTF-8 file; raises InputError when the file is missing, unreadable or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(_unreadable(error), path=path) from None
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason}); convert the file to UTF-8", path=path) from None


def read_json(path: Path | str) -> Any:
    """The value of a file that is one JSON text; raises InputError with the line and column where it is broken."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise _broken(error, path, getattr(error, "lineno", None)) from None


def read_json_lines(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number, from 1, and the object of every line that is not blank, one line in memory at a time; raises
    InputError (file:line) for a missing file, broken JSON, and a line that is not an object."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                try:
                    record = json.loads(text)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise _broken(error, path, line) from None
                yield line, _object(record, path, line)
    except OSError as error:
        raise InputError(_unreadable(error), path=path) from None
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason}); convert the file to UTF-8", path=path) from None


def read_json_values(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line on which it starts, from 1, and the object for every element of a file that is one JSON array, or
    for every object of a file that is not, over however many lines they go; raises InputError as `read_json_lines`."""
    text = read_text(path)
    decoder, at = json.JSONDecoder(), _skip_space(text, 0)
    array = text[at : at + 1] == "["
    at = _skip_space(text, at + array)
    line, counted = 1, 0
    while at < len(text) and not (array and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            record, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _broken(error, path, getattr(error, "lineno", line)) from None
        yield line, _object(record, path, line)
        at = _skip_space(text, at)
        if array and text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
        elif array and text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            raise InputError("broken JSON: the list goes on without a comma or is not closed", path=path, line=line)


def write_json_lines(path: Path | str, records: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, UTF-8, under a temporary name that is renamed to `path` when all is written;
    folders on the way are made."""
    with atomic_write(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _object(record: Any, path: Path | str, line: int) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f"expected a JSON object, found {type(record).__name__}", path=path, line=line)
    return record


def _unreadable(error: OSError) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"


def _broken(error: Exception, path: Path | str, line: int | None) -> InputError:
    problem = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
    return InputError(f"broken JSON: {problem}", path=path, line=line)
