import json

import pytest

from ttpa.tools.untyped import parameters_of, typed_value

SCHEMAS = {
    "text": {"type": "string"},
    "number": {"type": "integer"},
    "real": {"type": "number"},
    "flag": {"type": "boolean"},
    "maybe": {"type": ["string", "null"]},
    "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
    "some": {"anyOf": [{"$ref": "#/$defs/unit"}, {"type": "null"}]},
    "unit": {"$ref": "#/$defs/unit"},
    "one": {"enum": [1, 2]},
    "word": {"enum": ["1", "2"]},
    "list": {"type": "array"},
    "object": {"type": "object"},
    "any": {},
    "loop": {"$ref": "#/$defs/loop"},
}
DEFINITIONS = {"unit": {"type": "string", "enum": ["1", "km"]}, "loop": {"anyOf": [{"$ref": "#/$defs/loop"}]}}
PARAMETERS = {"type": "object", "properties": SCHEMAS, "$defs": DEFINITIONS}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "75001", "75001"),
        ("text", '"quoted"', '"quoted"'),
        ("text", "null", "null"),
        ("text", " a\n", " a\n"),
        ("text", "", ""),
        ("text", '{"a": 1}', '{"a": 1}'),
        ("number", "7", 7),
        ("number", " 7 ", 7),
        ("number", "7.0", 7.0),
        ("number", "7.5", 7.5),
        ("number", '"7"', '"7"'),
        ("number", "seven", "seven"),
        ("number", "7 days", "7 days"),
        ("number", "", ""),
        ("real", "1e-07", 1e-07),
        ("real", "3", 3),
        ("flag", "True", True),
        ("flag", "false", False),
        ("flag", "1", 1),
        ("maybe", "None", None),
        ("maybe", "null", None),
        ("maybe", "7", "7"),
        ("either", "7", 7),
        ("either", "7.5", "7.5"),
        ("some", "1", "1"),
        ("some", "None", None),
        ("unit", "1", "1"),
        ("one", "1", 1),
        ("word", "1", "1"),
        ("list", "[1, null]", [1, None]),
        ("list", "[1, ", "[1, "),
        ("list", '{"a": 1}', {"a": 1}),
        ("object", "{'a': True}", {"a": True}),
        ("any", "7", 7),
        ("any", "[true]", [True]),
        ("any", "['a']", "['a']"),
        ("any", "plain", "plain"),
        ("unlisted", "False", False),
        ("loop", "7", 7),
    ],
)
def test_the_schema_says_what_bare_text_is(key, text, value):
    read = typed_value(text, PARAMETERS, key)
    assert json.dumps(read.root.value) == json.dumps(value)
    start, end = read.root.span
    assert text[start:end] == (text if isinstance(value, str) else text.strip())


def test_only_containers_are_loose():
    assert typed_value("True", PARAMETERS, "flag").loose == []
    assert typed_value("{'a': True}", PARAMETERS, "object").loose == [(1, 4), (6, 10)]


def test_without_schema_every_key_is_unknown():
    assert typed_value("7", {}, "number").root.value == 7
    assert typed_value("x", {}, "number").root.value == "x"


def test_parameters_of_a_tool_whatever_the_tools_are():
    bare = {"name": "g", "parameters": {"properties": {"a": {"type": "string"}}}}
    odd = {"function": {"name": "h", "parameters": {"properties": []}}}
    tools = [None, "text", {"function": None}, {"name": "f"}, {"type": "function", "function": bare}, odd]
    assert parameters_of(tools, "g") == bare["parameters"] == parameters_of([bare], "g")
    assert [parameters_of(tools, name) for name in ("f", "h", "other", None)] == [{}] * 4
