import pytest

from ttpa.errors import InputError
from ttpa.tools.schema import allows_key, functions, schema_at, validator

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "stops": {"type": "array", "items": {"$ref": "#/$defs/stop"}},
        "extra": {"type": "object"},
        "prices": {"type": "object", "additionalProperties": {"type": "number"}},
    },
    "$defs": {"stop": {"type": "object", "properties": {"name": {"type": "string"}, "next": {"$ref": "#/$defs/stop"}}}},
}


def test_functions_takes_both_shapes_and_fills_in_parameters():
    wrapped = {"type": "function", "function": {"name": "a", "description": "d", "parameters": PARAMETERS}}
    found = functions([wrapped, {"name": "b"}, {"name": "c", "parameters": None}])
    assert found["a"] == {"name": "a", "description": "d", "parameters": PARAMETERS}
    assert found["b"]["parameters"] == found["c"]["parameters"] == {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        (["x"], "tool 0 has no"),
        ([{"type": "function"}], "tool 0 has no"),
        ([{"name": ""}], "tool 0 has no"),
        ([{"name": "a"}, {"function": {"name": "a"}}], "'a' is already taken"),
        ([{"name": "a", "parameters": [1]}], "must be a JSON Schema object"),
        ([{"name": "a", "parameters": {"type": "dict"}}], "'dict'"),
        ([{"name": "a", "parameters": {"properties": {"x": {"type": "float"}}}}], r"'a'.*\$\.properties\.x\.type"),
        ([{"name": "a", "parameters": {"properties": {"x": {"pattern": "("}}}}], r"\$\.properties\.x\.pattern"),
        ([{"name": "a", "parameters": {"properties": {"x": {"enum": [{1, 2}]}}}}], "must be JSON"),
    ],
)
def test_functions_says_what_is_wrong(tools, problem):
    with pytest.raises(InputError, match=problem):
        functions(tools)


def test_schema_at_follows_properties_items_and_references():
    assert schema_at(PARAMETERS, ()) is PARAMETERS
    assert schema_at(PARAMETERS, ("city",)) == {"type": "string"}
    assert schema_at(PARAMETERS, ("stops", 2, "next", "next", "name")) == {"type": "string"}
    assert schema_at(PARAMETERS, ("prices", "tea")) == {"type": "number"}
    assert schema_at(PARAMETERS, ("nobody", "knows", 3)) == {}


def test_a_ring_of_references_ends():
    ring = {"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"$ref": "#/$defs/b"}}}
    assert schema_at(ring, ("a",)) == {}


@pytest.mark.parametrize(
    ("schema", "allowed"),
    [
        ({"properties": {"a": {}}}, False),
        ({"properties": {"x": {}}}, True),
        ({"properties": {}}, False),
        ({}, True),
        ({"additionalProperties": False}, False),
        ({"properties": {}, "additionalProperties": True}, True),
        ({"properties": {}, "additionalProperties": {"type": "string"}}, True),
        ({"properties": {}, "patternProperties": {"^x": {}}, "additionalProperties": False}, True),
    ],
)
def test_allows_key(schema, allowed):
    assert allows_key(schema, "x") is allowed


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("date", "2024-02-29", "2023-02-29"),
        ("date-time", "2024-02-29T10:00:00Z", "2024-02-29 10:00"),
        ("date-time", "2024-02-29T10:00:00.25+02:00", "2024-02-30T10:00:00Z"),
        ("email", "a@b.c", "a.b.c"),
        ("ipv4", "10.0.0.1", "10.0.0.256"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123e4567"),
        ("regex", "a+", "a{99999999999999999999}"),
        ("regex", "(a)", "(" * 5000),
    ],
)
def test_formats_are_checked(kind, good, bad):
    check = validator({"type": "object", "properties": {"x": {"format": kind}}})
    assert not list(check.iter_errors({"x": good})) and not list(check.iter_errors({"x": 3}))
    assert [error.validator for error in check.iter_errors({"x": bad})] == ["format"]
