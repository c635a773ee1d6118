"""Records in JSON files: reading with line numbers, writing through a temporary name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from ttpa.errors import InputError, OnError
from ttpa.files import atomic_write

CHUNK = 1 << 20  # characters that are read at a time
_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"  # JSON's: other white space outside of a string is an error


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
        place = (error.lineno, error.colno) if isinstance(error, json.JSONDecodeError) else (None, 0)
        raise _broken(error, path, *place) from None


def read_json_lines(path: Path | str, *, on_error: OnError | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number, from 1, and the object of every line that is not blank, one line in memory at a time; raises
    InputError (file:line) for a missing file, broken JSON, and a line that is not an object. Where `on_error` is given,
    it is called for a broken line instead, and the next one is read."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line, text in enumerate(file, start=1):
                if not (text := text.rstrip(_SPACE)):
                    continue
                try:
                    record = _line(text, path, line)
                except InputError as error:
                    if on_error is None:
                        raise
                    on_error(error)
                else:
                    yield line, record
    except OSError as error:
        raise InputError(_unreadable(error), path=path) from None
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason}); convert the file to UTF-8", path=path) from None


def read_json_values(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line on which it starts, from 1, and the object for every element of a file that is one JSON array, or
    for every object of a file that is not, over however many lines they go, a few of them in memory at a time; raises
    InputError as `read_json_lines`."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from _values(_Window(file, path))
    except OSError as error:
        raise InputError(_unreadable(error), path=path) from None
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason}); convert the file to UTF-8", path=path) from None


def _line(text: str, path: Path | str, line: int) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _broken(error, path, line, getattr(error, "pos", 0) + 1) from None
    return _object(record, path, line)


def _values(window: _Window) -> Iterator[tuple[int, dict[str, Any]]]:
    array = window.next() == "["
    if array:
        window.skip(1)
    while (char := window.next()) and not (array and char == "]"):
        line = window.line
        yield line, _object(window.value(), window.path, line)
        if array and window.next() == ",":
            window.skip(1)
            if window.next() == "]":
                raise window.broken("a comma, and no value after it")
        elif array and window.next() != "]":
            raise window.broken("the list goes on without a comma" if window.next() else "the list is not closed")
    if array:
        if not char:
            raise window.broken("the list is not closed")
        window.skip(1)
        if window.next():
            raise window.broken("text after the list")


class _Window:
    """The part of a file that is in memory, and the line and column, from 1, at which it starts."""

    def __init__(self, file: IO[str], path: Path | str) -> None:
        self.file, self.path = file, path
        self.text, self.at = "", 0
        self.line, self.column = 1, 1

    def more(self) -> bool:
        """Read on, at least as much as is held, so that what is decoded again is never more than what is new."""
        held = self.text[self.at :]
        read = self.file.read(max(CHUNK, len(held)))
        self.text, self.at = held + read, 0
        return bool(read)

    def next(self) -> str:
        """Move to the next character that is not white space and return it, or "" at the end of the file."""
        while True:
            at = self.at
            while at < len(self.text) and self.text[at] in _SPACE:
                at += 1
            self.skip(at - self.at)
            if at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def skip(self, length: int) -> None:
        self.line, self.column = self.place(self.at + length)
        self.at += length

    def place(self, at: int) -> tuple[int, int]:
        """Line and column of a position in the text from the current one on."""
        lines = self.text.count("\n", self.at, at)
        return self.line + lines, at - self.text.rindex("\n", self.at, at) if lines else self.column + at - self.at

    def value(self) -> Any:
        """The value at the current position, to which the end of it is moved."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                place = self.place(error.pos)
                if not (_cut_off(error) and self.more()):
                    raise _broken(error, self.path, *place) from None
            except RecursionError as error:
                raise _broken(error, self.path, self.line, self.column) from None
            else:
                self.skip(end - self.at)
                return value

    def broken(self, problem: str) -> InputError:
        return InputError(f"broken JSON: {problem} (column {self.column})", path=self.path, line=self.line)


def _cut_off(error: json.JSONDecodeError) -> bool:
    """Whether the error may be that the text goes on: it is at the end, in a string, or in a word or an escape that the
    end cuts. (An unquoted line end is an error of its own, so a string that is not closed is found on its line.)"""
    return error.msg.startswith("Unterminated string") or len(error.doc.rstrip(_SPACE)) < error.pos + 12


def write_json_lines(path: Path | str, records: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, UTF-8, under a temporary name that is renamed to `path` when all is written;
    folders on the way are made."""
    with atomic_write(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _object(record: Any, path: Path | str, line: int) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f"expected a JSON object, found {type(record).__name__}", path=path, line=line)
    return record


def _unreadable(error: OSError) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"


def _broken(error: Exception, path: Path | str, line: int | None, column: int) -> InputError:
    problem = f"{error.msg} (column {column})" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
    return InputError(f"broken JSON: {problem}", path=path, line=line)
