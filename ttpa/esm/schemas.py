"""Which keys and defaults a schema gives at a place, through references and through allOf, anyOf and oneOf."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ttpa.tools.schema import allows_key, schema_at

_COMPOSED = ("allOf", "anyOf", "oneOf")
_KEYS = ("properties", "patternProperties", "additionalProperties")
Schemas = list[dict[str, Any]]


def schemas_at(parameters: dict[str, Any], path: Sequence[str | int]) -> Schemas:
    """All schemas that speak about the part of the arguments at `path`, of every branch; none if nothing does."""
    schemas = _composed([parameters], parameters)
    for key in path:
        schemas = _below(schemas, key, parameters)
    return schemas


def unknown_keys(value: Any, parameters: dict[str, Any]) -> Iterator[tuple[str | int, ...]]:
    """The path of every key at any depth that no schema of its object allows, by the rule of `allows_key`."""
    yield from _unknown(value, schemas_at(parameters, ()), parameters, ())


def _unknown(
    value: Any, schemas: Schemas, parameters: dict[str, Any], path: tuple[str | int, ...]
) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, dict):
        objects = [schema for schema in schemas if _describes_keys(schema)]
        for key, part in value.items():
            if objects and not any(allows_key(schema, key) and False not in _of(schema, key) for schema in objects):
                yield (*path, key)
            yield from _unknown(part, _below(schemas, key, parameters), parameters, (*path, key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _unknown(part, _below(schemas, index, parameters), parameters, (*path, index))


def _describes_keys(schema: dict[str, Any]) -> bool:
    """Whether the schema lists keys, or is of an object with any keys; one that only composes others does neither."""
    if any(keyword in schema for keyword in _KEYS):
        return True
    kinds = schema.get("type", ())
    return ("object" in kinds) and not any(keyword in schema for keyword in (*_COMPOSED, "$ref"))


def _below(schemas: Schemas, key: str | int, parameters: dict[str, Any]) -> Schemas:
    return _composed([part for schema in schemas for part in _of(schema, key)], parameters)


def _of(schema: dict[str, Any], key: str | int) -> list[Any]:
    """What the schema itself says about one key or item."""
    if isinstance(key, int):
        first = schema.get("prefixItems") or []
        return [first[key] if key < len(first) else schema.get("items")]
    properties, patterns = schema.get("properties") or {}, schema.get("patternProperties") or {}
    named = [properties[key]] if key in properties else []
    named += [part for pattern, part in patterns.items() if re.search(pattern, key)]
    return named or [schema.get("additionalProperties")]


def _composed(schemas: list[Any], parameters: dict[str, Any]) -> Schemas:
    """The schemas, what they refer to and what they are composed of, each once."""
    found: dict[int, dict[str, Any]] = {}
    waiting = schemas[::-1]
    while waiting:
        schema = waiting.pop()
        if not isinstance(schema, dict) or id(schema) in found:
            continue
        found[id(schema)] = schema
        reference = schema.get("$ref")
        if reference == "#":
            waiting.append(parameters)
        elif isinstance(reference, str):
            waiting.append(schema_at({**parameters, "$ref": reference}, ()))
        for keyword in _COMPOSED:
            waiting += reversed(schema.get(keyword, ()))
    return list(found.values())
