"""Function schemas: reading a tool list, and checking arguments against a function's JSON Schema."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import SchemaError
from referencing import Registry

from ttpa.errors import InputError

# A fixed list: which formats FormatChecker() knows depends on what else is installed, and so would the scores.
FORMATS = FormatChecker(formats=("date", "email", "ipv4", "ipv6", "uuid"))
_DATE_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d+)?(?:[Zz]|[-+]\d\d:\d\d)", re.ASCII)


@FORMATS.checks("regex", raises=(re.error, OverflowError, RecursionError))
def _is_regex(value: object) -> bool:
    """A pattern of Python, whatever it takes to find that it is none."""
    return not isinstance(value, str) or bool(re.compile(value))


@FORMATS.checks("date-time", raises=ValueError)
def _is_date_time(value: object) -> bool:
    """RFC 3339; strings only, as for every format."""
    if not isinstance(value, str):
        return True
    return bool(_DATE_TIME.fullmatch(value) and datetime.datetime.fromisoformat(value[:19].replace("t", "T")))


def functions(tools: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Function schemas by name, each as `{"name", "description", "parameters"}`.

    Takes OpenAI tools `{"type": "function", "function": {...}}` and bare functions. A function without parameters gets
    an object schema without properties. Raises InputError for anything that is no function schema, for a parameters
    schema that is not valid JSON Schema, and for a name that comes twice.
    """
    found: dict[str, dict[str, Any]] = {}
    for index, tool in enumerate(tools):
        bare = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(bare, dict) or not isinstance(bare.get("name"), str) or not bare["name"]:
            raise InputError(f'tool {index} has no function "name"')
        name, parameters = bare["name"], bare.get("parameters") or {}
        if name in found:
            raise InputError(f"tool {index}: the name {name!r} is already taken by an earlier tool")
        if not isinstance(parameters, dict):
            raise InputError(f"tool {name!r}: parameters must be a JSON Schema object")
        parameters = {"type": "object", "properties": {}, **parameters}
        if parameters["type"] != "object":
            raise InputError(f'tool {name!r}: parameters must have the type "object", not {parameters["type"]!r}')
        found[name] = {"name": name, "description": bare.get("description") or "", "parameters": parameters}
        try:
            validator(parameters)
        except InputError as error:
            raise InputError(f"tool {name!r}: {error}") from None
    return found


def validator(parameters: dict[str, Any]) -> Draft202012Validator:
    """A checker for a parameters schema: draft 2020-12, formats included, and no reference leaves the schema.

    Raises InputError if the schema is not valid JSON Schema.
    """
    try:
        return _compiled(json.dumps(parameters))
    except SchemaError as error:
        raise InputError(f"invalid JSON Schema at {error.json_path}: {error.message}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"a JSON Schema must be JSON: {error}") from None


@lru_cache(maxsize=4096)
def _compiled(text: str) -> Draft202012Validator:
    schema = json.loads(text)
    Draft202012Validator.check_schema(schema)
    # The registry is empty on purpose: jsonschema's default one fetches remote references over the network.
    return Draft202012Validator(schema, format_checker=FORMATS, registry=Registry())


def schema_at(parameters: dict[str, Any], path: Sequence[str | int]) -> dict[str, Any]:
    """The schema of the part of the arguments at `path`: by properties, items and local references, {} if they end."""
    schema: Any = _resolved(parameters, parameters)
    for part in path:
        if isinstance(part, int):
            schema = schema.get("items")
        else:
            schema = (schema.get("properties") or {}).get(part, schema.get("additionalProperties"))
        schema = _resolved(schema, parameters)
    return schema


def allows_key(schema: dict[str, Any], key: str) -> bool:
    """Whether an object of this schema may have the key.

    A schema that lists properties is taken to list all of them, unless additionalProperties is given and not false.
    """
    properties = schema.get("properties")
    if properties is not None and key in properties:
        return True
    if any(re.search(pattern, key) for pattern in schema.get("patternProperties", {})):
        return True
    return schema.get("additionalProperties", properties is None) is not False


def _resolved(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """Follow references into the schema itself, a few at most so that a ring of them ends."""
    for _ in range(8):
        if not isinstance(schema, dict):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        target: Any = root if reference == "#" or reference.startswith("#/") else None
        for part in reference.split("/")[1:]:
            target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        schema = target
    return {}
