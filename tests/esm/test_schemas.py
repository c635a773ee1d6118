import pytest

from ttpa.esm.differences import schema_differences
from ttpa.esm.schemas import schemas_at, unknown_keys

POINT = {"type": "object", "properties": {"x": {"type": "number", "default": 0}, "next": {"$ref": "#/$defs/point"}}}
CIRCLE = {"type": "object", "properties": {"r": {"type": "number"}}, "required": ["r"]}
OPEN = {"type": "object"}


def parameters(schema, **definitions):
    return {"type": "object", "properties": {"a": schema}, "$defs": {"point": POINT, "circle": CIRCLE, **definitions}}


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        (POINT, {"x": 1, "y": 2}, [("a", "y")]),
        (POINT, {"next": {"next": {"y": 1}}}, [("a", "next", "next", "y")]),
        ({"$ref": "#/$defs/point"}, {"y": 1}, [("a", "y")]),
        ({"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]}, {"x": 1, "y": 1}, [("a", "y")]),
        ({"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]}, None, []),
        ({"oneOf": [POINT, CIRCLE]}, {"x": 1, "r": 1, "y": 1}, [("a", "y")]),
        ({"anyOf": [POINT, OPEN]}, {"y": 1}, []),
        ({"anyOf": [POINT, {"type": ["object", "null"]}]}, {"y": 1}, []),
        ({"allOf": [POINT, CIRCLE]}, {"x": 1, "r": 1, "y": 1}, [("a", "y")]),
        ({"allOf": [POINT, {"required": ["x"]}]}, {"x": 1, "y": 1}, [("a", "y")]),
        ({"type": "object", "anyOf": [POINT, CIRCLE]}, {"y": 1}, [("a", "y")]),
        ({**POINT, "anyOf": [{"required": ["x"]}, {"required": ["next"]}]}, {"x": 1, "y": 1}, [("a", "y")]),
        ({"properties": {}, "additionalProperties": POINT}, {"k": {"y": 1}}, [("a", "k", "y")]),
        ({"patternProperties": {"^p": POINT}, "additionalProperties": False}, {"p": {"y": 1}, "q": 1}, None),
        ({"type": "array", "items": {"anyOf": [POINT, {"type": "string"}]}}, [{"y": 1}, "y"], [("a", 0, "y")]),
        (
            {"prefixItems": [POINT], "items": CIRCLE},
            [{"x": 1, "r": 1}, {"x": 1, "r": 1}],
            [("a", 0, "r"), ("a", 1, "x")],
        ),
        ({"type": "array"}, [{"y": 1}], []),
        ({"allOf": [{"$ref": "#"}]}, {"a": {"b": 1}}, [("a", "a", "b")]),
        ({"$ref": "#/$defs/ring"}, {"b": 1}, []),
    ],
)
def test_unknown_keys(schema, value, expected):
    found = list(unknown_keys({"a": value}, parameters(schema, ring={"anyOf": [{"$ref": "#/$defs/ring"}]})))
    assert found == ([("a", "p", "y"), ("a", "q")] if expected is None else expected)


def test_schemas_at_lists_every_branch():
    both = parameters({"anyOf": [{"$ref": "#/$defs/point"}, {"type": "object", "properties": {"x": {"const": 1}}}]})
    assert schemas_at(both, ("a", "x")) == [{"type": "number", "default": 0}, {"const": 1}]
    assert schemas_at(both, ("a", "nobody", 3)) == schemas_at(both, ("b",)) == []


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        # what only jsonschema objects to is not lost
        ({"allOf": [{**POINT, "additionalProperties": False}, CIRCLE]}, {"r": 1}, [("param.unknown", ("a", "r"))]),
        ({"properties": {"x": False}}, {"x": 1}, [("param.unknown", ("a", "x"))]),
        ({"patternProperties": {"^x": False}}, {"x": 1, "y": 1}, [("param.unknown", ("a", "x"))]),
        ({"if": {"minLength": 2}, "then": False}, "ab", [("value.constraint", ("a",))]),
        ({"allOf": [POINT], "unevaluatedProperties": False}, {"x": 1, "y": 1}, [("param.unknown", ("a", "y"))]),
        ({"type": "object", "unevaluatedProperties": False}, {"y": 1}, [("value.constraint", ("a",))]),
        ({"type": "object", "minProperties": 2}, {"y": 1}, [("value.constraint", ("a",))]),
        ({"type": "array", "uniqueItems": True}, [1, 1], [("value.constraint", ("a",))]),
        ({"type": "array", "items": {"enum": ["c"]}}, ["c", "k"], [("value.constraint", ("a", 1))]),
        ({"const": "c"}, "k", [("value.constraint", ("a",))]),
        ({"not": {"type": "null"}}, None, [("value.constraint", ("a",))]),
        (
            {"if": {"required": ["x"]}, "then": {"required": ["r"]}},
            {"x": 1},
            [("param.missing_required", ("a", "r"))],
        ),
        (
            {"anyOf": [POINT, {"type": "null"}]},
            {"x": "1", "y": 1},
            [("value.type", ("a", "x")), ("param.unknown", ("a", "y"))],
        ),
    ],
)
def test_the_schema_half_is_complete(schema, value, expected):
    assert [(d.code, d.path) for d in schema_differences({"a": value}, parameters(schema))] == expected
