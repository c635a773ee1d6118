"""Tools as people write them, made OpenAI tools with real JSON Schema; what had to be changed is listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ttpa.data.messages import without_nulls
from ttpa.data.type_words import read_type_words
from ttpa.errors import InputError

Repair = tuple[str, str]
_List = Callable[[str, str], None]

TYPE_WORDS = "type words read as JSON Schema"
UNKNOWN_WORDS = "unknown type words read as any value"
BARE_WORDS = "bare words read as schemas of that type"
FLAT = "flat parameters put into an object schema"
REQUIRED = "required moved to where JSON Schema has it"
NULLS = "null keywords of a schema left out"
ARROW = "nulls that Arrow put into tools left out"
ITEMS = "a list of items read as prefixItems"

_ONE = ("items", "additionalProperties", "not", "contains")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_SEVERAL = ("anyOf", "allOf", "oneOf", "prefixItems")
_MAY_BE_NULL = ("default", "const", "example")


def read_tools(value: Any, *, arrow: bool = False) -> tuple[list[dict[str, Any]], list[Repair]]:
    """OpenAI tools from a list of OpenAI tools or bare functions, from one of them, or from their JSON texts, and the
    (repair, detail) of everything that was changed, one of a kind: type words become types; parameters that are a flat
    map of names become an object schema, in which all are required that neither their words nor a default call
    optional; `required` beside the parameters or inside a property moves to its object. What is right already stays as
    it is. With `arrow` nulls that are not in a text go first: Arrow gives every object of a column the keys of all
    others. Whether the schemas are valid in the end is for `ttpa.tools.schema.functions` to say. Raises InputError for
    text that is no JSON and for what is no tool."""
    found: dict[str, list[str]] = {}
    if arrow and value != (value := without_nulls(value)):
        found[ARROW] = [""]
    value = _from_text(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list | None):
        raise InputError(f"tools must be a list or its JSON text, not {type(value).__name__}")
    try:
        tools = [
            _tool(_from_text(tool), lambda kind, detail: found.setdefault(kind, []).append(detail))
            for tool in value or []
        ]
    except RecursionError:
        raise InputError("the schema of a tool is nested too deeply") from None
    return tools, [(kind, "; ".join(details)) for kind, details in found.items()]


def _from_text(value: Any) -> Any:
    try:
        return json.loads(value or "null") if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise InputError(f"tools is text but no JSON: {error}") from None


def _tool(tool: Any, repair: _List) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InputError(f"a tool has no name: {tool!s:.80}")
    name, made = function["name"], dict(function)
    parameters, beside = function.get("parameters"), made.pop("required", None)
    if parameters is None:
        made.pop("parameters", None)
    elif not isinstance(parameters, dict):
        raise InputError(f"tool {name!r}: parameters must be an object, not {parameters!r:.80}")
    elif _is_flat(parameters):
        repair(FLAT, name)
        made["parameters"] = _object_of(parameters, name, repair)
    else:
        made["parameters"] = _schema(parameters, name, repair)
    for key in ("parameters", "required"):
        if key in function and function[key] is None:
            repair(NULLS, f"{name} {key}")
    if beside is not None:
        repair(REQUIRED, name)
        made["parameters"] = _also_required(made.get("parameters", {"type": "object"}), beside, name)
    return {**(tool if "function" in tool else {}), "type": "function", "function": made}


def _is_flat(parameters: dict[str, Any]) -> bool:
    """Whether these are the parameters by their names, and not a schema that has them in its properties."""
    if isinstance(parameters.get("type"), str | list) or any(keyword in parameters for keyword in ("$ref", *_SEVERAL)):
        return False
    properties = parameters.get("properties")
    named_properties = isinstance(properties, dict) and isinstance(properties.get("description"), str)
    if isinstance(properties, dict) and not named_properties:
        return False
    return all(isinstance(part, dict | str) for part in parameters.values())


def _object_of(parameters: dict[str, Any], name: str, repair: _List) -> dict[str, Any]:
    properties, required = {}, []
    for key, given in parameters.items():
        place, part = f"{name}.{key}", {"type": given} if isinstance(given, str) else given
        words = part.get("type")
        optional = isinstance(words, str) and read_type_words(words).optional
        optional = optional or "default" in part or part.get("optional") is True
        said = ("required", "optional")
        properties[key] = _schema({k: v for k, v in part.items() if k not in said}, place, repair)
        required += [key] if part.get("required", not optional) else []
    return {"type": "object", "properties": properties, "required": required}


def _schema(schema: Any, place: str, repair: _List) -> Any:
    """A schema at any depth, with JSON Schema's own types and all of `required` in its objects."""
    if isinstance(schema, bool):
        return schema
    if isinstance(schema, str):
        repair(BARE_WORDS, place)
        return _schema({"type": schema}, place, repair)
    if not isinstance(schema, dict):
        raise InputError(f"{place}: a schema must be an object, not {schema!r:.80}")
    made: dict[str, Any] = {}
    for key, part in schema.items():
        if part is None and key not in _MAY_BE_NULL:
            repair(NULLS, f"{place} {key}")
        elif key == "type":
            made.update((k, v) for k, v in _types(part, place, repair).items() if k == "type" or k not in schema)
        elif key == "items" and isinstance(part, list):
            repair(ITEMS, place)
            made["prefixItems"] = [_schema(item, place, repair) for item in part]
        elif key in _ONE:
            made[key] = _schema(part, place, repair)
        elif key in _NAMED and isinstance(part, dict):
            made[key] = {name: _schema(inner, f"{place}.{name}", repair) for name, inner in part.items()}
        elif key in _SEVERAL and isinstance(part, list):
            made[key] = [_schema(inner, place, repair) for inner in part]
        else:
            made[key] = part
    return _with_required(made, place, repair)


def _types(value: Any, place: str, repair: _List) -> dict[str, Any]:
    """The keywords that stand for a type word, or for a list of them."""
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        kinds = [_types(word, place, repair).get("type") for word in value]
        return {"type": kinds} if all(isinstance(kind, str) for kind in kinds) else {}
    if not isinstance(value, str):
        raise InputError(f"{place}: the type must be a word or a list of words, not {value!r:.80}")
    read = read_type_words(value)
    if read.schema != {"type": value}:
        repair(TYPE_WORDS if read.known else UNKNOWN_WORDS, f"{place}: {value}")
    return read.schema


def _with_required(schema: dict[str, Any], place: str, repair: _List) -> dict[str, Any]:
    """The schema with what its properties say of themselves, `"required": true`, in its own list."""
    properties = schema.get("properties")
    if not isinstance(properties, dict) or not any(_says(part) for part in properties.values()):
        return schema
    said = {key: part["required"] for key, part in properties.items() if _says(part)}
    repair(REQUIRED, place)
    bare = {
        key: {k: v for k, v in part.items() if k != "required"} if key in said else part
        for key, part in properties.items()
    }
    return _also_required({**schema, "properties": bare}, [key for key, value in said.items() if value], place)


def _says(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("required"), bool)


def _also_required(schema: dict[str, Any], names: Any, place: str) -> dict[str, Any]:
    listed = schema.get("required", [])
    if not isinstance(listed, list) or not isinstance(names, list):
        raise InputError(f"{place}: required must be a list of names")
    return {**schema, "required": listed + [name for name in names if name not in listed]}
