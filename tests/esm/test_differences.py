import pytest

from ttpa.errors import InputError
from ttpa.esm.differences import all_differences, gold_differences, schema_differences


def codes(differences):
    return [(d.code, d.path) for d in differences]


def parameters(**properties):
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": "integer"}, "3", [("value.type", ("x",))]),
        ({"type": "integer"}, True, [("value.type", ("x",))]),
        ({"type": "integer"}, 3.0, []),
        ({"type": "integer"}, 3.5, [("value.type", ("x",))]),
        ({"type": "number"}, 3, []),
        ({"type": ["string", "null"]}, 3, [("value.type", ("x",))]),
        ({"type": "string", "enum": ["a", "b"]}, 3, [("value.type", ("x",))]),
        ({"type": "string", "enum": ["a", "b"]}, "c", [("value.constraint", ("x",))]),
        ({"enum": ["a", "b"], "type": "string"}, 3, [("value.type", ("x",))]),
        ({"type": "integer", "minimum": 1}, 0, [("value.constraint", ("x",))]),
        ({"type": "string", "format": "date"}, "today", [("value.constraint", ("x",))]),
        ({"type": "array", "items": {"type": "integer"}}, [1, "2", 3], [("value.type", ("x", 1))]),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, {}, [("param.missing_required", ("x", "a"))]),
        ({"type": "object", "properties": {"a": {}}}, {"b": {"c": 1}}, [("param.unknown", ("x", "b"))]),
        ({"type": "object"}, {"b": 1}, []),
        ({"type": "object", "additionalProperties": False}, {"b": 1}, [("param.unknown", ("x", "b"))]),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "3", [("value.type", ("x",))]),
        ({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}, 0, [("value.constraint", ("x",))]),
        (
            {
                "anyOf": [
                    {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["m"]},
                    {"type": "null"},
                ]
            },
            {"n": "1"},
            [("value.type", ("x", "n")), ("param.missing_required", ("x", "m"))],
        ),
        ({"oneOf": [{"enum": ["a"]}, {"enum": ["b"]}]}, "c", [("value.constraint", ("x",))]),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, 1, [("value.constraint", ("x",))]),
    ],
)
def test_schema_differences(schema, value, expected):
    assert sorted(codes(schema_differences({"x": value}, parameters(x=schema)))) == sorted(expected)


def test_expected_is_the_keyword_that_was_broken():
    (difference,) = schema_differences({"x": "3"}, parameters(x={"type": "integer"}))
    assert (difference.expected, difference.got) == ({"type": "integer"}, "3")


@pytest.mark.parametrize("reference", ["#/$defs/nobody", "https://example.com/schema.json"])
def test_references_out_of_the_schema_are_refused(reference):
    with pytest.raises(InputError, match="does not contain"):
        schema_differences({"x": 1}, parameters(x={"$ref": reference}))


def test_no_reference_is_fetched_over_the_network(monkeypatch):
    asked = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *address, **_: asked.append(address))
    with pytest.raises(InputError, match="does not contain"):
        schema_differences({"x": 1}, parameters(x={"$ref": "https://example.com/other.json"}))
    assert asked == []


def test_an_endless_reference_is_refused():
    with pytest.raises(InputError, match="does not contain"):
        schema_differences({"x": 1}, parameters(x={"$ref": "#/properties/x"}))


@pytest.mark.parametrize(
    ("output", "gold", "expected"),
    [
        ({"a": 1.0}, {"a": 1}, []),
        ({"a": True}, {"a": 1}, [("value.wrong", ("a",))]),
        ({"a": "new york!"}, {"a": "New-York"}, [("value.near", ("a",))]),
        ({"a": "1.5"}, {"a": "15"}, [("value.wrong", ("a",))]),
        ({"a": "?"}, {"a": "!"}, [("value.wrong", ("a",))]),
        ({"a": "Straße"}, {"a": "STRASSE"}, [("value.near", ("a",))]),
        ({"a": [1, 2]}, {"a": [2, 1]}, [("value.wrong", ("a", 0)), ("value.wrong", ("a", 1))]),
        ({"a": [1]}, {"a": [1, 2]}, [("value.wrong", ("a",))]),
        (
            {"a": {"b": 1, "d": 4}},
            {"a": {"b": 2, "c": 3}},
            [
                ("param.missing_expected", ("a", "c")),
                ("value.wrong", ("a", "b")),
                ("param.unexpected", ("a", "d")),
            ],
        ),
        ({"a": None}, {}, [("param.unexpected", ("a",))]),
        ({"a": {}}, {"a": []}, [("value.wrong", ("a",))]),
    ],
)
def test_gold_differences(output, gold, expected):
    assert codes(gold_differences(output, gold)) == expected


def both(output, gold, schema):
    return codes(all_differences(schema_differences(output, schema), output, gold))


def test_one_cause_is_one_difference():
    schema = parameters(n={"type": "integer"}, unit={"enum": ["c", "f"]}) | {"required": ["n"]}
    assert both({"n": "3", "unit": "k", "x": 1}, {"n": 3, "unit": "c"}, schema) == [
        ("value.type", ("n",)),
        ("value.constraint", ("unit",)),
        ("param.unknown", ("x",)),
    ]
    assert both({}, {"n": 3}, schema) == [("param.missing_required", ("n",))]


def test_what_gold_does_not_have_is_still_checked_inside():
    schema = parameters(f={"type": "object", "properties": {"n": {}}, "required": ["n"]})
    assert both({"f": {}}, {}, schema) == [("param.missing_required", ("f", "n")), ("param.unexpected", ("f",))]


def test_gold_is_right_where_it_breaks_the_schema():
    schema = parameters(n={"type": "integer"}) | {"required": ["n", "m"]}
    assert both({"n": "3", "x": 1}, {"n": "3", "x": 1}, schema) == []
    assert both({"n": "4", "x": 2}, {"n": "3", "x": 1}, schema) == [("value.type", ("n",)), ("value.wrong", ("x",))]


@pytest.mark.parametrize(
    ("output", "gold", "expected"),
    [
        ({}, {"unit": "c"}, []),
        ({"unit": "c"}, {}, []),
        ({}, {"unit": "f"}, [("param.missing_expected", ("unit",))]),
        ({"unit": "f"}, {}, [("param.unexpected", ("unit",))]),
        ({"unit": "f"}, {"unit": "c"}, [("value.wrong", ("unit",))]),
        ({"page": {"size": 10}}, {"page": {}}, []),
        ({"page": {"size": 10.0}}, {"page": {"from": None}}, []),
        ({"page": {"size": True}}, {"page": {}}, [("value.type", ("page", "size"))]),
        ({"n": 1}, {}, []),
        ({}, {"n": 1}, [("param.missing_required", ("n",))]),
    ],
)
def test_defaults_are_honoured(output, gold, expected):
    page = {"type": "object", "properties": {"size": {"type": "integer", "default": 10}, "from": {"default": None}}}
    schema = parameters(unit={"type": "string", "default": "c"}, page={"$ref": "#/$defs/page"}, n={"default": 1})
    schema |= {"$defs": {"page": page}, "required": ["n"] if "n" in gold else []}
    by_schema = schema_differences(output, schema)
    assert codes(all_differences(by_schema, output, gold, schema)) == expected
