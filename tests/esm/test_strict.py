import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttpa.esm.errors import PENALTY
from ttpa.esm.score import score_call

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "w",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer", "minimum": 1},
                    "unit": {"type": "string", "enum": ["c", "f"]},
                    "stops": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"at": {"type": "string"}, "n": {"type": "integer"}},
                            "required": ["at"],
                        },
                    },
                },
                "required": ["city", "days"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
GOLD = {"name": "w", "arguments": {"city": "Oslo", "days": 3, "unit": "c"}}
NOW = {"name": "now", "arguments": {}}


def body(text):
    return f"<tool_call>\n{text}\n</tool_call>"


def turn(*calls):
    return "\n".join(body(json.dumps(call)) for call in calls)


def w(arguments):
    return body(f'{{"name": "w", "arguments": {arguments}}}')


# code, text, gold, call, pointer, text of the span, penalties of the calls
EXAMPLES = [
    ("no_call", "I do not know.", [GOLD], 0, "", ""),
    ("unwanted_call", turn(NOW), [], 0, "", turn(NOW)),
    ("format.unparseable", w('{"city": "Oslo", "days": }'), [GOLD], 0, "", "}}\n"),
    ("format.envelope", turn(GOLD).removesuffix("\n</tool_call>"), [GOLD], 0, "", ""),
    ("format.repairable", body(str(GOLD)), [GOLD], 0, "", "'name'"),
    ("call.missing", turn(NOW), [GOLD, NOW], 0, "", ""),
    ("call.extra", turn(GOLD, NOW), [GOLD], 1, "", turn(NOW)),
    ("call.repeated", turn(GOLD, GOLD), [GOLD], 1, "", turn(GOLD)),
    ("tool.unknown", turn({"name": "weather", "arguments": {}}), [GOLD], 0, "", '"weather"'),
    ("tool.wrong", turn(NOW), [GOLD], 0, "", '"now"'),
    ("param.missing_required", w('{"city": "Oslo", "unit": "c" }'), [GOLD], 0, "/days", "}"),
    ("param.missing_expected", w('{"city": "Oslo", "days": 3}'), [GOLD], 0, "/unit", "}"),
    ("param.unknown", w('{"city": "Oslo", "wind": 1, "days": 3, "unit": "c"}'), [GOLD], 0, "/wind", '"wind": 1,'),
    ("param.unknown", w('{"city": "Oslo", "days": 3, "unit": "c", "wind": 1}'), [GOLD], 0, "/wind", ', "wind": 1'),
    (
        "param.unexpected",
        w('{"city": "Oslo", "days": 3, "unit": "c", "stops": []}'),
        [GOLD],
        0,
        "/stops",
        ', "stops": []',
    ),
    ("param.duplicate", w('{"city": "Oslo", "days": 3, "unit": "c", "days": 3}'), [GOLD], 0, "/days", ', "days": 3'),
    ("value.type", w('{"city": "Oslo", "days": "3", "unit": "c"}'), [GOLD], 0, "/days", '"3"'),
    ("value.constraint", w('{"city": "Oslo", "days": 0, "unit": "c"}'), [GOLD], 0, "/days", "0"),
    ("value.constraint", w('{"city": "Oslo", "days": 3, "unit": "k"}'), [GOLD], 0, "/unit", '"k"'),
    ("value.wrong", w('{"city": "Rome", "days": 3, "unit": "c"}'), [GOLD], 0, "/city", '"Rome"'),
    ("value.near", w('{"city": "oslo", "days": 3, "unit": "c"}'), [GOLD], 0, "/city", '"oslo"'),
]


@pytest.mark.parametrize(("code", "text", "gold", "call", "pointer", "span"), EXAMPLES)
def test_each_code_with_its_place(code, text, gold, call, pointer, span):
    score = score_call(text, gold, TOOLS)
    (error,) = [e for e in score.errors if e.code == code]
    assert (error.call, error.pointer, text[slice(*error.span)]) == (call, pointer, span)
    assert not score.valid and score.score < 1.0


def test_the_examples_cover_every_code():
    assert {example[0] for example in EXAMPLES} == set(PENALTY)


@pytest.mark.parametrize("example", [e for e in EXAMPLES if not e[0].startswith(("no_", "unwanted", "call.", "tool."))])
def test_one_error_costs_its_penalty(example):
    score = score_call(example[1], [GOLD], TOOLS)
    if [e.code for e in score.errors] == [example[0]]:
        assert score.score == 1.0 - PENALTY[example[0]]
    else:
        assert example[0] == "format.unparseable" and score.score == 0.0


def test_expected_and_got():
    errors = score_call(w('{"city": "Rome", "days": "3", "unit": "c"}'), [GOLD], TOOLS).errors
    assert [(e.code, e.expected, e.got) for e in errors] == [
        ("value.type", {"type": "integer"}, "3"),
        ("value.wrong", "Oslo", "Rome"),
    ]
    (error,) = score_call(turn(NOW), [GOLD], TOOLS).errors
    assert (error.expected, error.got) == ("w", "now")


def test_all_errors_are_found_at_all_depths():
    gold = {"name": "w", "arguments": {"city": "Oslo", "days": 3, "stops": [{"at": "a", "n": 1}, {"at": "b"}]}}
    text = w('{"city": "oslo", "stops": [{"at": "a", "n": "1"}, {"n": 2, "x": 0}], "wind": 1}')
    errors = score_call(text, [gold], TOOLS).errors
    assert sorted((e.code, e.pointer, text[slice(*e.span)]) for e in errors) == [
        ("param.missing_required", "/days", "}"),
        ("param.missing_required", "/stops/1/at", "}"),
        ("param.unexpected", "/stops/1/n", '"n": 2,'),
        ("param.unknown", "/stops/1/x", ', "x": 0'),
        ("param.unknown", "/wind", ', "wind": 1'),
        ("value.near", "/city", '"oslo"'),
        ("value.type", "/stops/0/n", '"1"'),
    ]
    nested = next(e for e in errors if e.pointer == "/stops/1/at")
    assert nested.span[0] == text.index("}], ")


def test_only_an_exact_turn_scores_one():
    exact = w('{ "unit":"c", "days":3.0, "city":"\\u004fslo" }')
    assert score_call(exact, [GOLD], TOOLS) == score_call([GOLD], [GOLD], TOOLS)
    assert (score_call(exact, [GOLD], TOOLS).score, score_call(exact, [GOLD], TOOLS).valid) == (1.0, True)
    assert score_call("Hello.", [], TOOLS).score == 1.0
    assert score_call(turn(GOLD, NOW), [NOW, GOLD], TOOLS).score == 1.0


def test_worse_errors_score_less():
    scores = [
        score_call([{"name": "w", "arguments": arguments}], [GOLD], TOOLS).score
        for arguments in (
            GOLD["arguments"],
            {**GOLD["arguments"], "city": "oslo"},
            {"city": "oslo", "days": 3},
            {**GOLD["arguments"], "city": "Rome"},
            {**GOLD["arguments"], "city": "Rome", "days": 4},
        )
    ]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 5 and scores[-1] > 0.0


@pytest.mark.parametrize(
    ("output", "gold", "expected"),
    [
        ([GOLD], [GOLD, NOW], 0.5),
        ([GOLD, NOW], [GOLD], 0.5),
        ([GOLD, GOLD], [GOLD], 0.5),
        ([], [GOLD], 0.0),
        ([NOW], [], 0.0),
        ([NOW], [GOLD], 0.0),
    ],
)
def test_missing_and_extra_calls_take_an_equal_share(output, gold, expected):
    assert score_call(output, gold, TOOLS).score == expected


def test_a_turn_without_a_call_is_one_error():
    assert [e.code for e in score_call("", [GOLD, NOW], TOOLS).errors] == ["no_call"]


def test_parallel_calls_are_matched_optimally():
    def call(city, days):
        return {"name": "w", "arguments": {"city": city, "days": days}}

    # the first call is best matched with the second gold call, for only then the second finds a partner as good
    score = score_call([call("Oslo", 3), call("Oslo", 4)], [call("Oslo", 4), call("Bergen", 3)], TOOLS)
    assert score.score == 0.75
    assert [(e.call, e.code, e.pointer) for e in score.errors] == [(0, "value.wrong", "/city")]


def test_a_wrong_call_among_right_ones_is_matched_with_the_gold_call_left_over():
    score = score_call([NOW, GOLD], [GOLD, {"name": "w", "arguments": {"city": "Rome", "days": 1}}], TOOLS)
    assert [(e.call, e.code) for e in score.errors] == [(0, "tool.wrong")]
    assert score.score == 0.5


def test_among_equal_sums_calls_of_the_same_name_and_order_go_together():
    broken = body('{"name": "w", "arguments": {"city": "Oslo", "days": 3, "unit": }}')
    errors = score_call(broken + turn({"name": "x", "arguments": {}}), [NOW, GOLD], TOOLS).errors
    assert [(e.call, e.code) for e in errors] == [(0, "format.unparseable"), (1, "tool.unknown")]

    gold = [{"name": "w", "arguments": {"city": "a", "days": days}} for days in (1, 2)]
    wrong = {"name": "w", "arguments": {"city": "b", "days": 2}}
    errors = score_call([wrong, wrong], gold, TOOLS).errors
    assert [(e.call, e.pointer) for e in errors] == [(0, "/city"), (0, "/days"), (1, "/city")]


def test_what_follows_closed_arguments_does_not_hide_what_is_missing():
    text = body('{"name": "w", "arguments": {"city": "Oslo", "unit": "c"}')
    assert [(e.code, e.pointer) for e in score_call(text, [GOLD], TOOLS).errors] == [
        ("format.unparseable", ""),
        ("param.missing_required", "/days"),
    ]


def test_a_cut_call_is_charged_for_what_it_says_only():
    text = '<tool_call>\n{"name": "w", "arguments": {"city": "Rome", "stops": [{"at": "x"}, {'
    score = score_call(text, [GOLD], TOOLS)
    assert [(e.code, e.pointer) for e in score.errors] == [
        ("format.unparseable", ""),
        ("value.wrong", "/city"),
        ("param.unexpected", "/stops"),
    ]
    assert score.errors[0].span == (len(text), len(text)) and score.score == 0.0


def test_a_list_that_was_cut_is_not_compared():
    gold = {"name": "w", "arguments": {"city": "Oslo", "days": 3, "stops": [{"at": "x"}, {"at": "y"}]}}
    text = '<tool_call>\n{"name": "w", "arguments": {"city": "Oslo", "days": 3, "stops": [{"at": "x"}'
    assert [e.code for e in score_call(text, [gold], TOOLS).errors] == ["format.unparseable"]


def test_arguments_that_are_not_there():
    text = body('{"name": "w"}')
    errors = score_call(text, [GOLD], TOOLS).errors
    assert [(e.code, e.pointer, text[slice(*e.span)]) for e in errors] == [
        ("format.envelope", "", "}"),
        ("param.missing_required", "/city", "}"),
        ("param.missing_required", "/days", "}"),
        ("param.missing_expected", "/unit", "}"),
    ]


def test_the_gold_tool_may_be_missing_from_the_tools():
    stranger = {"name": "x", "arguments": {"a": 1}}
    assert score_call([stranger], [stranger], TOOLS).score == 1.0


def test_a_closing_tag_without_a_call_costs_the_whole():
    score = score_call("</tool_call>" + turn(GOLD), [GOLD], TOOLS)
    assert [(e.code, e.call) for e in score.errors] == [("format.envelope", -1)] and score.score == 0.5
    assert score_call("</tool_call>", [], TOOLS).score == 0.5


VALUES = st.sampled_from(["Oslo", "oslo", 3, 3.0, True, None, [1], {"at": "b"}])
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "days", "unit", "stops", "wind"]), VALUES, max_size=4)
CALLS = st.lists(
    st.builds(lambda n, a: {"name": n, "arguments": a}, st.sampled_from(["w", "now", "x"]), ARGUMENTS), max_size=3
)


@settings(deadline=None)
@given(CALLS, CALLS)
def test_any_two_turns(output, gold):
    given_as_text, given_as_records = score_call(turn(*output), gold, TOOLS), score_call(output, gold, TOOLS)
    assert given_as_text.score == given_as_records.score and given_as_text.valid == given_as_records.valid
    assert [(e.code, e.call, e.pointer) for e in given_as_text.errors] == [
        (e.code, e.call, e.pointer) for e in given_as_records.errors
    ]
    assert all(e.span is not None for e in given_as_text.errors)
    assert all(e.span is None for e in given_as_records.errors)
    assert 0.0 <= given_as_text.score <= 1.0 and given_as_text.valid == (not given_as_text.errors)
    assert (given_as_text.score == 1.0) == given_as_text.valid
    assert score_call(gold, gold, TOOLS).score == 1.0


@settings(deadline=None)
@given(st.text() | st.text(alphabet="{}[]\",:\\'<tool_call>/name w").map(lambda t: turn(GOLD)[:40] + t), CALLS)
def test_any_text(text, gold):
    for preset in ("strict", "release"):
        score = score_call(text, gold, TOOLS, preset=preset)
        assert 0.0 <= score.score <= 1.0
        assert all(e.span is not None and 0 <= e.span[0] <= e.span[1] <= len(text) for e in score.errors)


def test_thirty_calls_are_quick():
    rng = random.Random(0)
    calls = [{"name": "w", "arguments": {"city": f"c{rng.randrange(9)}", "days": rng.randrange(5)}} for _ in range(30)]
    start = time.perf_counter()
    score = score_call(calls, rng.sample(calls, 30), TOOLS)
    assert time.perf_counter() - start < 2.0
    assert score.score == 1.0
