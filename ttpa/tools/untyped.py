"""Values that stand in a call as bare text, so that only the tool's schema can say what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ttpa.tools.json_scan import Scan, Value, scan
from ttpa.tools.schema import schema_at

_NAMES = {str: "string", dict: "object", list: "array"}


def parameters_of(tools: Sequence[dict[str, Any]], name: str | None) -> dict[str, Any]:
    """The parameters schema of the tool of that name, {} if there is none; tools need not be valid."""
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and function.get("name") == name:
            parameters = function.get("parameters")
            if isinstance(parameters, dict) and isinstance(parameters.get("properties", {}), dict):
                return parameters
    return {}


def typed_value(text: str, parameters: dict[str, Any], key: str) -> Scan:
    """What the bare text of a parameter stands for, as `scan` gives it, spans within `text`.

    Of the types that the schema admits for the key, the text is a value of the first kind that fits: an object, array,
    number, boolean or null written as JSON (or a word as Python writes it: True, False, None), else a string, which is
    the text itself, quotes included. Where none fits, or the schema says nothing, JSON is what it says and any other
    text is a string. Only objects and arrays can be `loose`, that is in Python's quotes and words, and only where the
    schema asks for one.
    """
    types = _types(schema_at(parameters, [key]), parameters)
    read = scan(text)
    plain = Scan(Value(text, (0, len(text))), len(text), None, [])
    if read.error or read.root is None or isinstance(read.root.value, str) or text[read.end :].strip():
        return plain
    fits = not types.isdisjoint(_types_of_value(read.root.value))
    if isinstance(read.root.value, dict | list):
        return read if fits or not (read.loose or "string" in types) else plain
    return plain if "string" in types and not fits else Scan(read.root, read.end, None, [])


def _types(schema: Any, parameters: dict[str, Any], depth: int = 0) -> set[str]:
    """The JSON types that a schema admits; empty if it does not say."""
    if not isinstance(schema, dict) or depth > 8:
        return set()
    if "$ref" in schema:
        schema = schema_at({**parameters, **schema}, ())
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return {part for part in declared if isinstance(part, str)}
    listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(listed, list):
        return {name for value in listed for name in _types_of_value(value)}
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            parts = [_types(part, parameters, depth + 1) for part in schema[word]]
            return set().union(*parts) if all(parts) else set()
    return set()


def _types_of_value(value: Any) -> set[str]:
    """The names of the JSON types that a value has; a number without a fraction is an integer as well."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if isinstance(value, int) or value.is_integer() else {"number"}
    return {next((name for kind, name in _NAMES.items() if isinstance(value, kind)), "null")}
