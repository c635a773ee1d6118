import json

import pytest

from ttpa.errors import InputError
from ttpa.esm.bfcl import argument_error
from ttpa.esm.score import score_call, score_tokens

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple")
WEATHER = {
    "name": "m.weather",
    "description": "",
    "parameters": {
        "type": "dict",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"type": "string", "enum": ["c", "f"]},
            "zoom": {"type": "float"},
        },
        "required": ["city"],
    },
}
NOW = {"name": "now", "parameters": {"type": "dict", "properties": {}, "required": []}}
GOLD = [{"m.weather": {"city": ["New York, NY", "NYC"], "days": [3], "unit": ["", "c"]}}]
RIGHT = {"city": "NYC", "days": 3}


def call(name="m.weather", **arguments):
    return {"name": name, "arguments": arguments}


def score(*output, gold=GOLD, tools=(WEATHER,)):
    return score_call(list(output), gold, list(tools), preset="bfcl")


def text_of(*calls):
    return "\n".join(f"<tool_call>\n{json.dumps(c)}\n</tool_call>" for c in calls)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_verdict_of_the_original(real_data):
    tools, gold = {}, {}
    for category in CATEGORIES:
        for row in rows(real_data / "bfcl" / "question" / f"BFCL_v4_{category}.json"):
            tools[row["id"]] = row["function"]
        for row in rows(real_data / "bfcl" / "possible_answer" / f"BFCL_v4_{category}.json"):
            gold[row["id"]] = row["ground_truth"]
    verdicts = rows(real_data / "bfcl" / "oracle_verdicts.jsonl")
    wrong = []
    for verdict in verdicts:
        output = [{"name": n, "arguments": a} for record in verdict["output"] for n, a in record.items()]
        found = score_call(output, gold[verdict["id"]], tools[verdict["id"]], preset="bfcl")
        reported = found.errors[0].error_type if found.errors else None
        if (found.valid, reported) != (verdict["valid"], verdict["error_type"]):
            wrong.append((verdict["id"], verdict["mutation"], reported, verdict["error_type"]))
        assert found.score == float(found.valid) and found.valid == (not found.errors)
    assert wrong == [] and len(verdicts) == 1166


ARRAY = {"type": "array", "items": {"type": "float"}}
TEXTS = {"type": "array", "items": {"type": "string"}}
DICTS = {"type": "array", "items": {"type": "dict"}}


@pytest.mark.parametrize(
    ("schema", "value", "alternatives", "expected"),
    [
        ("integer", True, [1], "type_error:simple"),
        ("integer", 5.0, [5], "type_error:simple"),
        ("float", 5, [5.0], None),
        ("number", 5, [5.0], None),
        ("float", 10**400, [5.0], "type_error:simple"),
        (ARRAY, [1, 2], [[1.0, 2.0]], "type_error:nested"),
        (ARRAY, [1.0, 2.0], [[1.0, 2.0]], None),
        (ARRAY, [1.0], [], "type_error:simple"),
        ("string", "new york ny", ["New York, NY"], None),
        ("string", "10:00", ["1000"], "value_error:string"),
        ("string", "it's", ['it"s'], None),
        ("string", "", ["", "x"], None),
        ("string", ", .", ["", "x"], None),
        (TEXTS, [], ["", ["a"]], None),
        (TEXTS, [], [["a"]], "value_error:list/tuple"),
        (TEXTS, ["b", "a"], [["a", "b"]], "value_error:list/tuple"),
        (TEXTS, ["A.", "b c"], [["a", "bc"]], None),
        ("dict", {"a": 1}, [{"a": [1], "b": ["", 2]}], None),
        ("dict", {"a": 1, "c": 1}, [{"a": [1]}], "value_error:dict_key"),
        ("dict", {}, [{"a": [1]}], "value_error:dict_key"),
        ("dict", {"a": 2}, [{"a": [1]}], "value_error:dict_value"),
        ("dict", {"a": 2}, [{"a": [1], "b": [1]}], "value_error:dict_key"),
        ("dict", {"a": True}, [{"a": [1]}], None),
        ("dict", {"a": {"b": 1}}, [{"a": [{"b": 1}]}], None),
        ("dict", {"a": {"b": 1}}, [{"a": [{"b": [1]}]}], "value_error:dict_value"),
        ("object", {"a": "X."}, ["", {"a": ["x"]}], None),
        ("dict", {"a": 1}, [], "dict_checker:unclear"),
        (DICTS, [{"a": 1}], [[{"a": [1]}]], None),
        (DICTS, [{"a": 1}], [[{"a": [1]}, {"a": [2]}]], "value_error:list_dict_count"),
        (DICTS, [{"a": 1}, {"a": 1}], [[{"a": [1]}, {"a": [2]}]], "value_error:dict_value"),
        (DICTS, [], ["", [{"a": [1]}]], None),
        ("integer", "now", ["now"], None),
        ("integer", "Now", ["now"], "value_error:others"),
        ("string", "X.", [3, "x"], "value_error:others"),
        ("string", "x", [3, "x"], None),
        ("string", None, [None, "x"], None),
        ("string", None, ["x", None], "type_error:simple"),
        ("any", 3, [3], None),
        ("any", 3, ["3"], "type_error:simple"),
        ("integer", 3, [], "value_error:others"),
        ("float", 0.30000000000000004, [0.3], "value_error:others"),
        (ARRAY, (1.0,), [[1.0]], "type_error:simple"),
        ({**ARRAY, "type": "tuple"}, (1.0,), [[1.0]], None),
        ({**ARRAY, "type": "tuple"}, [1.0], [[1.0]], None),
        ("HashMap", {"a": 1}, [{"a": 1}], None),
        ("HashMap", {"a": 2}, [{"a": 1}], "value_error:others"),
        ({"type": ["string", "null"]}, "x", ["x"], None),
        ({}, "x", ["y"], "value_error:others"),
        # the original crashes on these two
        (DICTS, ["x"], ["", [{"a": [1]}]], "value_error:dict_value"),
        (TEXTS, ["x"], [["x"], 3], None),
    ],
)
def test_the_rules_for_one_argument(schema, value, alternatives, expected):
    schema = {"type": schema} if isinstance(schema, str) else schema
    assert argument_error(value, alternatives, schema) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (RIGHT, []),
        ({**RIGHT, "unit": "C."}, []),
        ({**RIGHT, "days": "3"}, [("value.type", "/days", {"type": "integer"}, "3", "type_error:simple")]),
        ({**RIGHT, "days": 4}, [("value.wrong", "/days", [3], 4, "value_error:others")]),
        ({"days": 3}, [("param.missing_required", "/city", ["New York, NY", "NYC"], None, "missing_required")]),
        ({"city": "NYC"}, [("param.missing_expected", "/days", [3], None, "missing_optional")]),
        ({**RIGHT, "zoom": 1.0}, [("param.unexpected", "/zoom", None, 1.0, "unexpected_param")]),
        ({**RIGHT, "zz": 1}, [("param.unknown", "/zz", None, 1, "unexpected_param")]),
        (
            {"days": True, "zz": 1},  # all errors, and first the one that BFCL stops at
            [
                ("param.missing_required", "/city", ["New York, NY", "NYC"], None, "missing_required"),
                ("value.type", "/days", {"type": "integer"}, True, "type_error:simple"),
                ("param.unknown", "/zz", None, 1, "unexpected_param"),
            ],
        ),
    ],
)
def test_all_errors_of_a_call(arguments, expected):
    found = score(call(**arguments))
    assert [
        (e.code, e.pointer, e.expected, e.got, e.error_type.split("checker:")[-1]) for e in found.errors
    ] == expected
    assert (found.valid, found.score) == (not expected, float(not expected))


def test_an_enum_is_not_looked_at():
    assert score(call(**RIGHT, unit="k"), gold=[{"m.weather": {"city": ["NYC"], "days": [3], "unit": ["k"]}}]).valid


@pytest.mark.parametrize(("name", "code"), [("m_weather", "tool.unknown"), ("now", "tool.wrong")])
def test_names_are_compared_as_they_are(name, code):
    (error,) = score(call(name, **RIGHT), tools=(WEATHER, NOW)).errors
    assert (error.code, error.expected, error.got) == (code, "m.weather", name)
    assert error.error_type == "simple_function_checker:wrong_func_name"


@pytest.mark.parametrize(
    ("output", "gold", "tools", "code", "kind"),
    [
        ([], GOLD, [WEATHER], "no_call", "simple_function_checker"),
        ([], GOLD, [WEATHER, NOW], "no_call", "multiple_function_checker"),
        ([call(**RIGHT)], GOLD * 2, [WEATHER], "call.missing", "parallel_function_checker_no_order"),
        ([call(**RIGHT), call(**RIGHT)], GOLD, [WEATHER], "call.repeated", "simple_function_checker"),
        ([call("now"), call(**RIGHT)], GOLD, [WEATHER, NOW], "call.extra", "multiple_function_checker"),
    ],
)
def test_wrong_counts(output, gold, tools, code, kind):
    (error,) = score(*output, gold=gold, tools=tools).errors
    assert (error.code, error.error_type) == (code, kind + ":wrong_count")


def test_parallel_calls_in_any_order():
    gold = [{"m.weather": {"city": [city]}} for city in ("a", "b", "c")]
    assert score(*(call(city=city) for city in "cab"), gold=gold).valid
    found = score(*(call(city=city) for city in "cxb"), gold=gold)
    assert [(e.call, e.code, e.expected, e.got) for e in found.errors] == [(1, "value.wrong", ["a"], "x")]
    assert found.errors[0].error_type == "parallel_function_checker_no_order:cannot_find_match"


def test_quirk_the_matching_is_greedy_in_gold_order():
    gold = [{"m.weather": {"city": ["a", "b"]}}, {"m.weather": {"city": ["a"]}}]
    found = score(call(city="a"), call(city="b"), gold=gold)
    assert [(e.call, e.code, e.expected, e.got) for e in found.errors] == [(1, "value.wrong", ["a"], "b")]
    assert score(call(city="b"), call(city="a"), gold=gold).valid


def test_what_cannot_be_matched_goes_with_what_it_is_most_like():
    gold = [{"now": {}}, {"m.weather": {"city": ["a"], "days": [1]}}, {"m.weather": {"city": ["b"], "days": [2]}}]
    found = score(call(city="b", days=9), call(city="x", days=1), call("then"), gold=gold, tools=(WEATHER, NOW))
    assert [(e.call, e.code, e.pointer) for e in found.errors] == [
        (0, "value.wrong", "/days"),
        (1, "value.wrong", "/city"),
        (2, "tool.unknown", ""),
    ]


def test_calls_that_are_equally_wrong_go_by_their_order():
    gold = [{"m.weather": {"city": [city]}} for city in "abcd"]
    found = score(*(call(city=city) for city in "wxyz"), gold=gold)
    assert [(e.call, *e.expected) for e in found.errors] == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]


def test_where_no_call_is_right():
    assert score(gold=[]).valid and score_call("Hello.", [], [WEATHER], preset="bfcl").valid
    (error,) = score(call(**RIGHT), gold=[]).errors
    assert (error.code, error.error_type) == ("unwanted_call", "irrelevance_error:decoder_success")
    broken = text_of(call(**RIGHT)).replace("}}", "}")
    assert score_call(broken, [], [WEATHER], preset="bfcl").valid


def test_text_that_is_not_well_formed_is_not_decoded():
    text = text_of(call(**RIGHT))
    assert score_call(text, GOLD, [WEATHER], preset="bfcl").score == 1.0
    for bad in (text.replace("}}", "}"), text.replace("\n</tool_call>", ""), text.replace('"', "'")):
        found = score_call(bad, GOLD, [WEATHER], preset="bfcl")
        assert found.score == 0.0 and found.errors[0].span is not None
        assert {e.error_type for e in found.errors} == {"ast_decoder:decoder_failed"}


@pytest.mark.parametrize(
    ("arguments", "code", "place"),
    [
        ({**RIGHT, "days": 44}, "value.wrong", "44"),
        ({"city": "NYC"}, "param.missing_expected", "}"),
        ({**RIGHT, "zz": 1}, "param.unknown", ', "zz": 1'),
    ],
)
def test_errors_have_their_place(tokenizer, arguments, code, place):
    text = text_of(call(**arguments))
    ids = tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
    (error,) = score_tokens(tokenizer, ids, GOLD, [WEATHER], preset="bfcl").errors
    assert (error.code, text[slice(*error.span)]) == (code, place)
    assert tokenizer.decode(ids[slice(*error.tokens)]) == place


def test_openai_tools_will_do():
    tool = {"type": "function", "function": {**WEATHER, "parameters": {**WEATHER["parameters"], "type": "object"}}}
    assert score(call(**RIGHT), tools=[tool]).valid


@pytest.mark.parametrize(
    ("gold", "tools", "problem"),
    [
        ([call(**RIGHT)], [WEATHER], "gold call 0 must be"),
        ([{"m.weather": {"city": "NYC"}}], [WEATHER], "gold call 0 must be"),
        (["now"], [WEATHER], "gold call 0 must be"),
        ([{"then": {}}], [WEATHER, NOW], "'then', which is not among the tools: m.weather, now"),
        (GOLD, [{}], "tool 0 has no"),
        (GOLD, [{"name": "a", "parameters": {"properties": [1]}}], "'a': parameters must be"),
        (GOLD, [{"name": "a", "parameters": "x"}], "'a': parameters must be"),
        (GOLD, [{"name": "a", "parameters": {"required": [["x"]]}}], "'a': required must be"),
    ],
)
def test_other_gold_and_tools_are_refused(gold, tools, problem):
    with pytest.raises(InputError, match=problem):
        score(call(**RIGHT), gold=gold, tools=tools)
