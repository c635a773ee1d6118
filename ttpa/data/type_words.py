"""Type words of Python, Java and TypeScript as JSON Schema: `List[int]`, `str, optional`, `dict`, `int | None`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]

_WORDS = {
    "string": "string str text char character date datetime time uuid url uri email path",
    "integer": "integer int long short bigint int32 int64",
    "number": "number float double decimal numeric float32 float64",
    "boolean": "boolean bool",
    "array": "array list tuple set frozenset sequence iterable arraylist queue stack ndarray",
    "object": "object dict map mapping hashmap hashtable record",
    "null": "null none nonetype",
    "any": "any enum",
}
_TYPES = {word: name for name, words in _WORDS.items() for word in words.split()}
_TOKEN = re.compile(r"""[A-Za-z_][\w.]*|'[^']*'|"[^"]*"|-?\d+(?:\.\d+)?|\.\.\.|\S""", re.ASCII)
_LONGEST = 200  # characters; longer text is no type, and the reader below goes as deep as the text has brackets
_ANY_NUMBER: Schema = {"...": True}  # the dots of Tuple[int, ...]


@dataclass(frozen=True)
class TypeWords:
    """The schema that type words stand for ({} for any value), whether they say that the parameter may be left out, and
    whether all of them were known."""

    schema: Schema
    optional: bool
    known: bool


def read_type_words(text: str) -> TypeWords:
    """Read what people write where JSON Schema has a type: the types of Python, Java and TypeScript, with parts in
    brackets, unions by `|`, `or` and Union, and the notes `optional`, `required` and `default ..` after a comma or in
    parentheses. A type that admits null may be left out, as may one with a default. Never raises: text that is not
    known stands for any value."""
    words, notes = _split(_TOKEN.findall(text) if len(text) <= _LONGEST else [])
    reader = _Reader(words)
    schema = reader.union()
    known = reader.known and reader.at == len(words)
    optional = "optional" in notes or "default" in notes or "null" in _kinds(schema)
    if "default" in notes:
        notes = notes[: notes.index("default")]  # what follows is the default itself
    known = known and set(notes) <= {"optional", "required", ",", "(", ")"}
    return TypeWords(schema if known else {}, optional, known)


def _split(tokens: list[str]) -> tuple[list[str], list[str]]:
    """The tokens of the type, and in lower case those of the notes after it."""
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token in ("[", "<")) - (token in ("]", ">"))
        if depth == 0 and token.lower() in (",", "(", "default"):
            return tokens[:index], [note.lower() for note in tokens[index:]]
    return tokens, []


class _Reader:
    """Recursive descent over the tokens; after an unknown word `known` is False and reading goes on as it can."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at, self.known = tokens, 0, True

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def union(self) -> Schema:
        parts = [self.single()]
        while self.peek().lower() in ("|", "or"):
            self.take()
            parts.append(self.single())
        return _union(parts)

    def single(self) -> Schema:
        word = self.take().rsplit(".", 1)[-1].lower()
        if word == "literal":
            return self.literal()
        array_of = self.tokens[self.at : self.at + 2] == ["[", "]"]
        parts = self.parts() if self.peek() in ("[", "<") and not array_of else []
        schema: Schema = {}
        self.known = self.known and (word == "tuple" or _ANY_NUMBER not in parts)
        if word in ("optional", "union") and parts:
            schema = _union(parts + ([{"type": "null"}] if word == "optional" else []))
        elif word in _TYPES:
            schema = _container(_TYPES[word], parts, fixed=word == "tuple")
        else:
            self.known = False
        while self.tokens[self.at : self.at + 2] == ["[", "]"]:
            self.at += 2
            schema = {"type": "array", "items": schema}
        return schema

    def parts(self) -> list[Schema]:
        """What stands between brackets, each part a type."""
        close = {"[": "]", "<": ">"}[self.take()]
        parts = []
        while self.known and self.peek() != close:
            parts.append(_ANY_NUMBER if self.peek() == "..." and self.take() else self.union())
            self.known = self.known and (self.peek() == close or self.take() == ",")
        self.take()
        return parts

    def literal(self) -> Schema:
        self.known = self.take() == "["
        values: list[Any] = []
        while self.known and (token := self.take()) != "]":
            if token[:1] in ("'", '"'):
                values.append(token[1:-1])
            elif token[-1:].isdigit():
                values.append(float(token) if "." in token else int(token))
            else:
                self.known = token == ","
        return {"enum": values}


def _container(kind: str, parts: list[Schema], *, fixed: bool) -> Schema:
    if kind == "any":
        return {}
    if kind == "array" and fixed and parts and _ANY_NUMBER not in parts:
        return {"type": "array", "prefixItems": parts, "minItems": len(parts), "maxItems": len(parts)}
    if kind == "array" and parts and parts[0]:
        return {"type": "array", "items": parts[0]}
    if kind == "object" and len(parts) == 2 and parts[1]:
        return {"type": "object", "additionalProperties": parts[1]}
    return {"type": kind}


def _union(parts: list[Schema]) -> Schema:
    if len(parts) == 1 or {} in parts:
        return parts[0] if len(parts) == 1 else {}
    if all(part.keys() == {"type"} for part in parts):
        kinds = list(dict.fromkeys(kind for part in parts for kind in _kinds(part)))
        return {"type": kinds[0] if len(kinds) == 1 else kinds}
    return {"anyOf": parts}


def _kinds(schema: Schema) -> list[str]:
    """The types that a schema of this file admits at its top."""
    if "anyOf" in schema:
        return [kind for part in schema["anyOf"] for kind in _kinds(part)]
    kinds = schema.get("type", [])
    return kinds if isinstance(kinds, list) else [kinds]
