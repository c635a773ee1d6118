from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from ttpa.data.type_words import read_type_words

INTEGER, STRING = {"type": "integer"}, {"type": "string"}


@pytest.mark.parametrize(
    ("words", "schema", "optional"),
    [
        ("string", STRING, False),
        ("str", STRING, False),
        ("str, optional", STRING, True),
        ("string (optional)", STRING, True),
        ("int, optional, default is 3", INTEGER, True),
        ("int, default=[1, 2]", INTEGER, True),
        ("Set[str], required", {"type": "array", "items": STRING}, False),
        ("dict", {"type": "object"}, False),
        ("HashMap", {"type": "object"}, False),
        ("double", {"type": "number"}, False),
        ("any", {}, False),
        ("List[int]", {"type": "array", "items": INTEGER}, False),
        ("typing.List[List[int]]", {"type": "array", "items": {"type": "array", "items": INTEGER}}, False),
        ("list[Any]", {"type": "array"}, False),
        ("ArrayList<String>", {"type": "array", "items": STRING}, False),
        ("string[][]", {"type": "array", "items": {"type": "array", "items": STRING}}, False),
        ("Dict[str, int]", {"type": "object", "additionalProperties": INTEGER}, False),
        ("Tuple[int, ...]", {"type": "array", "items": INTEGER}, False),
        ("Tuple[int, str]", {"type": "array", "prefixItems": [INTEGER, STRING], "minItems": 2, "maxItems": 2}, False),
        ("Optional[str]", {"type": ["string", "null"]}, True),
        ("int | None", {"type": ["integer", "null"]}, True),
        ("int or str", {"type": ["integer", "string"]}, False),
        ("List[Optional[int]]", {"type": "array", "items": {"type": ["integer", "null"]}}, False),
        (
            "Union[int, List[int]]",
            {"anyOf": [INTEGER, {"type": "array", "items": INTEGER}]},
            False,
        ),
        ("Literal['km', 2, 0.5], optional", {"enum": ["km", 2, 0.5]}, True),
    ],
)
def test_types_of_python_java_and_typescript(words, schema, optional):
    read = read_type_words(words)
    assert (read.schema, read.optional, read.known) == (schema, optional, True)


@pytest.mark.parametrize(
    ("words", "optional"),
    [
        ("", False),
        ("Callable[[float], float], optional", True),
        ("default='x'", True),
        ("List[int", False),
        ("List[...]]", False),
        ("Union[int, ...]", False),
        ("int]", False),
        ("int str", False),
        ("Literal['a'", False),
        ("Widget", False),
        ("List[" * 100_000, False),
    ],
)
def test_what_is_not_known_stands_for_any_value(words, optional):
    read = read_type_words(words)
    assert (read.schema, read.optional, read.known) == ({}, optional, False)


WORDS = [
    "int",
    "List",
    "Optional",
    "Union",
    "Tuple",
    "Literal",
    "optional",
    "default",
    "'a'",
    "...",
    "[",
    "]",
    ",",
    "|",
]


@given(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join) | st.text(max_size=30))
def test_any_text_gives_a_valid_schema(text):
    Draft202012Validator.check_schema(read_type_words(text).schema)
