import json

import pytest

from ttpa.esm.score import score_call


def tool(name, **properties):
    required = [key for key, kind in properties.items() if not kind.endswith("?")]
    kinds = {key: {"type": kind.removesuffix("?")} for key, kind in properties.items()}
    return {"name": name, "parameters": {"type": "object", "properties": kinds, "required": required}}


TOOLS = [
    tool("w", city="string", days="integer", unit="string?"),
    tool("twin", city="string", days="integer"),
    tool("now"),
]
PARIS = {"city": "Paris", "days": 3}
GOLD = {"name": "w", "arguments": PARIS}
NOW = {"name": "now", "arguments": {}}


def w(**arguments):
    return {"name": "w", "arguments": arguments}


def text_of(*calls):
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


def score(preset, output, gold=(GOLD,)):
    return score_call(output, gold, TOOLS, preset=preset).score


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ([GOLD], 3.0),
        ([w(city="paris", days=3)], 1.5),
        ([w(city="Paris")], 0.75),
        ([w(city="Paris", days="3")], 1.5),
        ([w(**PARIS, unit="c")], 2.5),
        ([w(**PARIS, wind=1)], 2.5),
        ([{"name": "twin", "arguments": PARIS}], -3.0),
        ([w(town="Paris", count=3)], -1.5),
        ([GOLD, GOLD], 2.25),
        ([], -3.0),
        ("I do not know.", -3.0),
        (text_of(GOLD), 3.0),
        (text_of(GOLD).replace("}}", "}"), -3.0),
        (text_of(GOLD).replace("\n</tool_call>", ""), -3.0),
    ],
)
def test_toolrl(output, expected):
    assert round(score("toolrl", output), 3) == expected


def test_toolrl_takes_for_each_gold_call_the_unused_call_that_gives_most():
    gold = [w(city="a", days=1), w(city="b", days=2)]
    assert score("toolrl", gold[::-1], gold) == 3.0
    # names 1; the first gold call takes the second call (1 + 2), the second one what is left (1 + 0) of 7
    assert round(score("toolrl", [w(city="x", days=9), gold[0]], gold), 3) == round(6 * 5 / 7 - 3, 3)
    # one call for two: names 1/2, the first gold call takes it whole
    assert round(score("toolrl", [gold[0]], gold), 3) == round(6 * 3.5 / 7 - 3, 3)


def test_toolrl_without_arguments_or_gold():
    assert score("toolrl", [NOW], [NOW]) == 3.0
    assert score("toolrl", [], []) == score("toolrl", [NOW], []) == 0.0


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("I do not know.", -2.0),
        (text_of(GOLD).replace("}}", "}"), -2.0),
        ([{"name": "nobody", "arguments": PARIS}], -2.0),
        ([{"name": "twin", "arguments": PARIS}], -1.5),
        ([w(city="Paris", unit="c", wind=1)], -1.8),
        ([w(**PARIS, unit="c", wind=1)], -1.3),
        ([w(city="Paris", wind=1)], -1.3),
        ([w(city="Paris", unit="c")], -1.0),
        ([w(**PARIS, wind=1)], -0.8),
        ([w(**PARIS, unit="c")], -0.5),
        ([w(city="Paris")], -0.5),
        ([w(city="Rome", days=3)], -0.25),
        ([w(city="Paris", days=True)], -0.25),
        ([w(city="Paris", days=3.0)], 1.0),
        ([GOLD], 1.0),
        ([GOLD, NOW], 1.0),  # later calls are not looked at
    ],
)
def test_tl_training(output, expected):
    assert score("tl_training", output) == expected


@pytest.mark.parametrize(("output", "expected"), [([], 1.0), ([NOW], -1.5), ([w(), NOW], -1.5), ("</tool_call>", 1.0)])
def test_tl_training_without_gold(output, expected):
    assert score("tl_training", output, []) == expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ([GOLD, NOW], 1.0),
        ([NOW, GOLD], 1.0),
        ([NOW, w(days=3, city="Paris")], 1.0),
        (text_of(NOW, GOLD), 1.0),
        (text_of(NOW, GOLD).replace("}}", "}"), 0.0),
        (text_of(NOW, GOLD).replace('"', "'"), 0.0),
        ([GOLD], 0.0),
        ([GOLD, NOW, NOW], 0.0),
        ([w(city="paris", days=3), NOW], 0.0),
        ([w(city="Paris", days=3.0), NOW], 0.0),
        ([], 0.0),
    ],
)
def test_binary(output, expected):
    assert score("binary", output, [GOLD, NOW]) == expected


def test_binary_without_gold():
    assert score("binary", "Hello.", []) == 1.0 and score("binary", [NOW], []) == 0.0


@pytest.mark.parametrize("preset", ["toolrl", "tl_training", "binary"])
def test_errors_are_those_of_strict(preset):
    for output in ([w(city="Rome", days="3", wind=1)], text_of(GOLD, NOW)[:-5], [GOLD]):
        strict, other = score_call(output, [GOLD], TOOLS), score_call(output, [GOLD], TOOLS, preset=preset)
        assert (other.errors, other.valid) == (strict.errors, strict.valid)
