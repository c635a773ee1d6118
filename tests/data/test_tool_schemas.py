from __future__ import annotations

import json

import pytest

from ttpa.data.schemas import read_tools
from ttpa.errors import InputError
from ttpa.tools.schema import functions

RIGHT = {
    "type": "function",
    "strict": True,
    "function": {
        "description": "Weather.",
        "name": "weather",
        "parameters": {
            "properties": {
                "city": {"description": "x", "type": "string", "default": None},
                "days": {"type": "integer"},
            },
            "required": ["city"],
            "type": "object",
            "$defs": {"type": {"enum": [1]}},
        },
    },
}


def parameters_of(parameters, **function) -> tuple[dict, dict[str, str]]:
    (tool,), repairs = read_tools([{"name": "f", "parameters": parameters, **function}])
    functions([tool])
    return tool["function"]["parameters"], dict(repairs)


def test_tools_that_are_right_stay_as_they_are():
    for value in ([RIGHT], RIGHT, json.dumps([RIGHT]), [json.dumps(RIGHT)]):
        tools, repairs = read_tools(value)
        assert json.dumps(tools) == json.dumps([RIGHT]) and repairs == []
    assert read_tools([RIGHT["function"]])[0] == [{"type": "function", "function": RIGHT["function"]}]
    assert read_tools(None) == read_tools("") == read_tools("null") == read_tools([]) == ([], [])


def test_a_flat_map_of_parameters_becomes_an_object_schema():
    flat = {
        "type": {"type": "str", "description": "A parameter that is called type."},
        "page": {"type": "int, optional"},
        "size": {"type": "integer", "default": 10},
        "tags": {"type": "List[str]", "required": True},
        "note": "string",
        "mode": {"required": False, "enum": ["a", "b"]},
    }
    schema, repairs = parameters_of(flat)
    assert schema == {
        "type": "object",
        "properties": {
            "type": {"type": "string", "description": "A parameter that is called type."},
            "page": {"type": "integer"},
            "size": {"type": "integer", "default": 10},
            "tags": {"type": "array", "items": {"type": "string"}},
            "note": {"type": "string"},
            "mode": {"enum": ["a", "b"]},
        },
        "required": ["type", "tags", "note"],
    }
    assert repairs == {
        "flat parameters put into an object schema": "f",
        "type words read as JSON Schema": "f.type: str; f.page: int, optional; f.tags: List[str]",
    }
    assert parameters_of({})[0] == {"type": "object", "properties": {}, "required": []}
    assert parameters_of({"properties": {"description": "x", "type": "str"}})[0]["required"] == ["properties"]
    assert list(parameters_of({"properties": {"description": {"type": "str"}}})[0]["properties"]) == ["description"]


def test_type_words_at_any_depth():
    schema, repairs = parameters_of(
        {
            "type": "dict",
            "properties": {
                "where": {"type": "dict", "properties": {"lat": {"type": "float"}, "unit": {"type": ["str", "null"]}}},
                "tags": {"type": "array", "items": "string"},
                "more": {"anyOf": [{"type": "int"}, {"type": "tuple", "items": [{"type": "int"}]}]},
                "own": {"items": {"type": "string"}, "type": "List[int]"},
                "odd": {"type": "Widget", "description": "?"},
            },
        }
    )
    assert schema == {
        "type": "object",
        "properties": {
            "where": {
                "type": "object",
                "properties": {"lat": {"type": "number"}, "unit": {"type": ["string", "null"]}},
            },
            "tags": {"type": "array", "items": {"type": "string"}},
            "more": {"anyOf": [{"type": "integer"}, {"type": "array", "prefixItems": [{"type": "integer"}]}]},
            "own": {"items": {"type": "string"}, "type": "array"},
            "odd": {"description": "?"},
        },
    }
    assert repairs["type words read as JSON Schema"].startswith("f: dict; f.where: dict; f.where.lat: float; ")
    assert repairs["unknown type words read as any value"] == "f.odd: Widget"
    assert repairs["bare words read as schemas of that type"] == "f.tags"
    assert repairs["a list of items read as prefixItems"] == "f.more"


def test_required_moves_to_where_json_schema_has_it():
    schema, repairs = parameters_of(
        {"type": "object", "properties": {"a": {"type": "string", "required": True}, "b": {"type": "string"}}},
        required=["b"],
    )
    assert schema["required"] == ["a", "b"] and schema["properties"]["a"] == {"type": "string"}
    assert repairs == {"required moved to where JSON Schema has it": "f; f"}
    schema, repairs = parameters_of({"type": "object", "required": None}, required=None)
    assert schema == {"type": "object"}
    assert repairs == {"null keywords of a schema left out": "f required; f required"}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("[{", "tools is text but no JSON"),
        ('"f"', "tools must be a list"),
        (3, "tools must be a list"),
        ([{"description": "x"}], "a tool has no name"),
        ([{"name": "f", "parameters": [1]}], "'f': parameters must be an object"),
        ([{"name": "f", "required": "x"}], "required must be a list"),
        ([{"name": "f", "parameters": {"properties": {"a": 3}}}], "f.a: a schema must be an object, not 3"),
        ([{"name": "f", "parameters": {"properties": {"a": {"type": {}}}}}], "f.a: the type must be a word"),
    ],
)
def test_what_is_no_tool(tools, message):
    with pytest.raises(InputError, match=message):
        read_tools(tools)


def test_a_schema_that_is_nested_too_deeply():
    schema: dict = {"type": "string"}
    for _ in range(2000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(InputError, match="nested too deeply"):
        read_tools([{"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}])
