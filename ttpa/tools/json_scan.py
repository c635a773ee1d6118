"""A JSON reader that knows where everything stands and keeps what it had read when the text goes wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from json import JSONDecodeError, JSONDecoder
from typing import Any

Span = tuple[int, int]

DEEPEST = 100
_decode_string = JSONDecoder().raw_decode
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None}
_PYTHON_WORDS = {"True": True, "False": False, "None": None}
_WORD = re.compile("|".join([*_WORDS, *_PYTHON_WORDS]))
_OPEN_STRING = re.compile(r'"[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*')
_SINGLE_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL)


@dataclass
class Value:
    """One JSON value, its half-open character span, and its parts if it is an object or an array.

    `members` keeps every key in the order of the text, duplicates too; `value` is what `json.loads` gives (the last
    duplicate wins). `closed` is False for a container that the text ends or breaks in; its span ends at the error.
    """

    value: Any
    span: Span
    members: list[Member] = field(default_factory=list)
    items: list[Value] = field(default_factory=list)
    closed: bool = True


@dataclass
class Member:
    """One key of an object and its value. The key's span includes the quotes."""

    key: str
    key_span: Span
    value: Value


@dataclass
class JsonError:
    """The first place at which the text stops being JSON."""

    position: int
    message: str


@dataclass
class Scan:
    """What `scan` read: the value if any, where reading stopped, the error if any, and what only Python would accept.

    `loose` holds the spans of single-quoted strings and of True, False, None: read, but not JSON.
    """

    root: Value | None
    end: int
    error: JsonError | None
    loose: list[Span]


def scan(text: str, start: int = 0) -> Scan:
    """Read one JSON value of `text` from `start` on and say where each part stands; text after the value is left alone.

    Never raises. At the first error reading stops: strings, numbers and words that were complete by then are kept, and
    so are the containers around them, with `closed` False. Single-quoted strings and Python's True, False and None are
    read and listed in `loose`. Not read: NaN and Infinity, numbers beyond the range of a double, containers more than
    100 deep. Spans are half-open, in characters of `text`.
    """
    scanner = _JsonScanner(text, start)
    root = scanner.value(0)
    return Scan(root, scanner.error.position if scanner.error else scanner.at, scanner.error, scanner.loose)


def pointer(path: Iterable[str | int]) -> str:
    """The JSON pointer (RFC 6901) of a path of keys and indexes; the empty path gives the empty text."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


class Scanner:
    """What readers of JSON and of Python's literals share. After an error `self.error` is set and every caller returns
    with what it has."""

    space = _SPACE

    def __init__(self, text: str, at: int) -> None:
        self.text = text
        self.at = at
        self.error: JsonError | None = None
        self.loose: list[Span] = []

    def fail(self, message: str, position: int | None = None) -> None:
        """Set the error, here unless a position is given."""
        self.error = JsonError(self.at if position is None else position, message)

    def skip_space(self) -> str:
        """Move to the next character that is not white space and return it, or "" at the end."""
        self.at = self.space.match(self.text, self.at).end()  # type: ignore[union-attr]  # matches the empty text
        return self.text[self.at : self.at + 1]

    def value(self, depth: int) -> Value | None:
        """Read one value, None where there is none."""
        raise NotImplementedError

    def string(self) -> str | None:
        """Read the string whose quote stands here, None where it is none."""
        raise NotImplementedError

    def member(self, parent: Value, depth: int) -> None:
        """Read a key and its value into an object that is `depth` containers deep, as far as they can be read."""
        if self.skip_space() not in ('"', "'"):
            return self.fail("expected a key in quotes")
        key_start = self.at
        key = self.string()
        if key is None:
            return None
        key_span = (key_start, self.at)
        if self.skip_space() != ":":
            return self.fail("expected ':'")
        self.at += 1
        value = self.value(depth + 1)
        if value is not None:
            parent.members.append(Member(key, key_span, value))
            parent.value[key] = value.value
        return None

    def goes_on(self, bracket: str) -> bool:
        """True after a comma; False at the closing bracket and, with the error set, at anything else."""
        char = self.skip_space()
        if char == ",":
            self.at += 1
            return True
        if char != bracket:
            self.fail(f"expected ',' or '{bracket}'")
        return False

    def close(self, container: Value) -> Value:
        """The container, which ends behind its closing bracket or at the error."""
        if self.error is None:
            self.at += 1
            container.closed = True
        container.span = (container.span[0], self.error.position if self.error else self.at)
        return container


class _JsonScanner(Scanner):
    """Recursive descent."""

    def value(self, depth: int) -> Value | None:
        char = self.skip_space()
        start = self.at
        if char in ("{", "["):
            if depth == DEEPEST:
                self.fail(f"containers more than {DEEPEST} deep")
                return None
            return self.object(depth) if char == "{" else self.array(depth)
        if char in ('"', "'"):
            string = self.string()
            return None if string is None else Value(string, (start, self.at))
        if word := _WORD.match(self.text, start):
            self.at = word.end()
            if word[0] in _PYTHON_WORDS:
                self.loose.append(word.span())
            return Value((_WORDS | _PYTHON_WORDS)[word[0]], word.span())
        if number := _NUMBER.match(self.text, start):
            if math.isinf(float(number[0])):
                self.fail("number out of range")
                return None
            self.at = number.end()
            return Value(int(number[0]) if number[0].lstrip("-").isdigit() else float(number[0]), number.span())
        self.fail("expected a value" if char else "the text ends where a value should stand")
        return None

    def string(self) -> str | None:
        start = self.at
        try:
            if self.text[start] == '"':
                # Of a broken string the decoder counts the lines before it: it sees no more than it needs.
                end = _OPEN_STRING.match(self.text, start).end()  # type: ignore[union-attr]  # matches the quote
                string, length = _decode_string(self.text[start : end + 8])
                self.at = start + length
                return string
            if single := _SINGLE_QUOTED.match(self.text, start):
                double = re.sub(r"\\'|\"", lambda m: "'" if m[0] == "\\'" else '\\"', single[1].replace('\\"', '"'))
                string, _ = _decode_string(f'"{double}"')
                self.at = single.end()
                self.loose.append(single.span())
                return string
            self.fail("the string does not end")
        except JSONDecodeError as error:
            self.fail(error.msg, start + error.pos if self.text[start] == '"' else start)
        return None

    def object(self, depth: int) -> Value:
        result = Value({}, (self.at, self.at), closed=False)
        self.at += 1
        if self.skip_space() != "}":
            while True:
                self.member(result, depth)
                if self.error or not self.goes_on("}"):
                    break
        return self.close(result)

    def array(self, depth: int) -> Value:
        result = Value([], (self.at, self.at), closed=False)
        self.at += 1
        if self.skip_space() != "]":
            while True:
                value = self.value(depth + 1)
                if value is not None:
                    result.items.append(value)
                    result.value.append(value.value)
                if self.error or not self.goes_on("]"):
                    break
        return self.close(result)
