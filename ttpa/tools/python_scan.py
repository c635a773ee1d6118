"""A reader of Python literals that knows where each part stands and keeps what it had read when the text goes wrong."""

from __future__ import annotations

import math
import re

from ttpa.tools.json_scan import DEEPEST, Scan, Scanner, Value

_SPACE = re.compile(r"[ \t\n\r\f]*")
_DIGITS = r"[0-9](?:_?[0-9])*"
_NUMBER = re.compile(rf"[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][-+]?{_DIGITS})?")
_WORDS = {"True": True, "False": False, "None": None}
_JSON_WORDS = {"true": True, "false": False, "null": None}
_WORD = re.compile("|".join([*_WORDS, *_JSON_WORDS]))
# Each turn of a loop begins with a backslash or a quote, so that a string without an end costs linear time.
_STRING = {
    "'": re.compile(r"'([^'\\]*(?:\\.[^'\\]*)*)'", re.DOTALL),
    '"': re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL),
    "'''": re.compile(r"'''([^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*)'''", re.DOTALL),
    '"""': re.compile(r'"""([^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*)"""', re.DOTALL),
}
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_ESCAPED = {**dict(zip("abfnrtv", "\a\b\f\n\r\t\v", strict=True)), **{c: c for c in "\\'\""}, "\n": ""}


def scan(text: str, start: int = 0) -> Scan:
    """Read one Python literal of `text` from `start` on and say where each part stands; text after it is left alone.

    Read are strings, decimal numbers, True, False, None, lists, and dicts whose keys are strings; `members` and `items`
    of the values are those of `json_scan.scan`. Never raises. At the first error reading stops: what was complete by
    then is kept, and so are the containers around it, with `closed` False. Tuples (as lists), JSON's true, false and
    null, and strings in single quotation marks that hold a line break are read and listed in `loose`. Two escapes that
    make up a surrogate pair are one character, as in JSON. Not read: everything else that Python would compute (names,
    calls, operators, prefixes and adjacent strings), escapes by name, numbers beyond the range of a double, containers
    more than 100 deep. Spans are half-open, in characters of `text`.
    """
    scanner = _PythonScanner(text, start)
    root = scanner.value(0)
    return Scan(root, scanner.error.position if scanner.error else scanner.at, scanner.error, scanner.loose)


class _PythonScanner(Scanner):
    """Recursive descent."""

    space = _SPACE

    def value(self, depth: int) -> Value | None:
        char = self.skip_space()
        start = self.at
        if char and char in "{[(":
            if depth == DEEPEST:
                self.fail(f"containers more than {DEEPEST} deep")
                return None
            return {"{": self.dictionary, "[": self.sequence, "(": self.parentheses}[char](depth)
        if char in ("'", '"'):
            string = self.string()
            return None if string is None else Value(string, (start, self.at))
        if word := _WORD.match(self.text, start):
            self.at = word.end()
            if word[0] in _JSON_WORDS:
                self.loose.append(word.span())
            return Value((_WORDS | _JSON_WORDS)[word[0]], word.span())
        if number := _NUMBER.match(self.text, start):
            return self.number(number)
        self.fail("expected a value" if char else "the text ends where a value should stand")
        return None

    def number(self, number: re.Match[str]) -> Value | None:
        digits = number[0].lstrip("+-")
        if math.isinf(float(number[0])):
            self.fail("number out of range")
            return None
        whole = digits.replace("_", "").isdigit()
        if whole and digits[0] == "0" and digits.strip("0_"):
            self.fail("a whole number with a zero before it")
            return None
        self.at = number.end()
        if whole:
            return Value(0 if digits[0] == "0" else int(number[0]), number.span())
        return Value(float(number[0]), number.span())

    def string(self) -> str | None:
        start, quote = self.at, self.text[self.at]
        triple = self.text.startswith(quote * 3, start)
        string = _STRING[quote * 3 if triple else quote].match(self.text, start)
        if string is None:
            self.fail("the string does not end")
            return None
        raw, characters, done = [], [], string.start(1)
        for escape in _ESCAPE.finditer(self.text, *string.span(1)):
            character = _character(escape)
            if character is None:
                self.fail("an escape that is none", escape.start())
                return None
            raw.append(self.text[done : escape.start()])
            characters.append(character)
            done = escape.end()
        raw.append(self.text[done : string.end(1)])
        self.at = string.end()
        if not triple and any("\n" in part or "\r" in part for part in raw):
            self.loose.append(string.span())
        if not characters:
            return raw[0]
        whole = "".join(part for pair in zip(raw, [*characters, ""], strict=True) for part in pair)
        return whole.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")

    def dictionary(self, depth: int) -> Value:
        result = Value({}, (self.at, self.at), closed=False)
        self.at += 1
        while self.skip_space() != "}":
            self.member(result, depth)
            if self.error or not self.goes_on("}"):
                break
        return self.close(result)

    def sequence(self, depth: int, bracket: str = "]") -> Value:
        result = Value([], (self.at, self.at), closed=False)
        self.at += 1
        while self.skip_space() != bracket:
            value = self.value(depth + 1)
            if value is not None:
                result.items.append(value)
                result.value.append(value.value)
            if self.error or not self.goes_on(bracket):
                break
        return self.close(result)

    def parentheses(self, depth: int) -> Value:
        """A tuple as a list; or one value, which without a comma is only that value."""
        place = len(self.loose)
        result = self.sequence(depth, ")")
        if result.closed and len(result.items) == 1:
            (inner,) = result.items
            if _SPACE.match(self.text, inner.span[1]).end() + 1 == self.at:  # type: ignore[union-attr]  # as above
                return Value(inner.value, result.span, inner.members, inner.items)
        self.loose.insert(place, result.span)
        return result


def _character(escape: re.Match[str]) -> str | None:
    """What an escape stands for; one that Python does not know stays as it is, one that is cut short is None."""
    octal, *codes, other = escape.groups()
    if other is not None:
        return None if other in "xuUN" else _ESCAPED.get(other, escape[0])
    code = int(octal, 8) if octal else int(next(c for c in codes if c), 16)
    return chr(code) if code < 0x110000 else None
