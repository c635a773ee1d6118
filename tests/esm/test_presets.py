import os

import pytest

from ttpa.errors import InputError
from ttpa.esm.errors import PENALTY
from ttpa.esm.presets import read_penalties
from ttpa.esm.score import score_call

KINDS = {"city": {"type": "string"}, "days": {"type": "integer"}}
TOOLS = [
    {"name": "w", "parameters": {"type": "object", "properties": KINDS, "required": ["city"]}},
    {"name": "now"},
]
GOLD = {"name": "w", "arguments": {"city": "Oslo", "days": 3}}
NOW = {"name": "now", "arguments": {}}


@pytest.fixture
def preset(tmp_path):
    def write(*lines):
        path = tmp_path / "my.yaml"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def w(**arguments):
    return {"name": "w", "arguments": arguments}


def test_what_the_file_does_not_name_is_as_in_strict(preset):
    path = preset("value.near: 0.25  # a comment", "value.wrong: fatal", "param.unknown: 1e-1")
    changed = {"value.near": 0.25, "value.wrong": 1.0, "param.unknown": 0.1}
    assert read_penalties(path) == {**PENALTY, **changed}
    assert score_call([w(city="oslo", days=3, x=1)], [GOLD], TOOLS, preset=path).score == pytest.approx(0.75 * 0.9)
    assert score_call([w(city="Rome", days=3)], [GOLD], TOOLS, preset=str(path)).score == 0.0
    assert score_call([w(city="Oslo", days="3")], [GOLD], TOOLS, preset=path).score == 0.5


@pytest.mark.parametrize("output", [[GOLD], [w(city="Rome", x=1)], [NOW, GOLD], [GOLD, GOLD], [], "<tool_call>{"])
def test_the_table_of_strict_gives_strict(preset, output):
    path = preset(*(f"{code}: {penalty}" for code, penalty in PENALTY.items()))
    for gold in ([GOLD], [GOLD, NOW], []):
        assert score_call(output, gold, TOOLS, preset=path) == score_call(output, gold, TOOLS)


def test_a_code_without_a_penalty_does_not_count(preset):
    path = preset("value.near: 0", "call.repeated: 0", "no_call: 0")
    assert score_call([w(city="oslo", days=3)], [GOLD], TOOLS, preset=path) == score_call([GOLD], [GOLD], TOOLS)
    assert score_call([GOLD, GOLD], [GOLD], TOOLS, preset=path).valid
    assert score_call("?", [GOLD], TOOLS, preset=path).score == 1.0
    assert [e.code for e in score_call([w(city="oslo", days=4)], [GOLD], TOOLS, preset=path).errors] == ["value.wrong"]


@pytest.mark.parametrize(
    ("output", "gold", "expected"), [([GOLD, NOW], [GOLD], 1 / 1.5), ([GOLD], [GOLD, NOW], 1 / 1.25), ([NOW], [], 0.25)]
)
def test_missing_and_surplus_calls_count_by_their_penalty(preset, output, gold, expected):
    path = preset("call.extra: major", "call.missing: 0.25", "unwanted_call: 0.75")
    assert score_call(output, gold, TOOLS, preset=path).score == pytest.approx(expected)


def test_a_file_that_changed_is_read_again(preset):
    path = preset("value.wrong: 0.2")
    assert read_penalties(path)["value.wrong"] == 0.2
    preset("value.wrong: 0.3")
    os.utime(path, ns=(0, 0))
    assert read_penalties(path)["value.wrong"] == 0.3


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (
            ["value.near: 0", "value.wrnog: 1"],
            r"my\.yaml:2: unknown error code 'value.wrnog': did you mean value.wrong\?",
        ),
        (["", "qqqq: 1"], r"my\.yaml:2: unknown error code 'qqqq': the codes are no_call, "),
        (["value.near: 1.5"], r"my\.yaml:1: value.near: expected a number from 0 to 1 or one of fatal, .*got '1.5'"),
        (["value.near: bad"], r"my\.yaml:1: value.near: expected a number"),
        (["value.near: true"], r"my\.yaml:1: value.near: expected a number"),
        (["value.near: .nan"], r"my\.yaml:1: value.near: expected a number"),
        (["value.near:"], r"my\.yaml:1: value.near: expected a number"),
        (["value.near: [1]"], r"my\.yaml:1: value.near: expected a number.*got a nested value"),
        (["? [a]", ": 1"], r"my\.yaml:1: unknown error code"),
        (["value.near: 0", "value.near: 1"], r"my\.yaml:2: value.near is given twice"),
        (["- value.near"], r"my\.yaml:1: expected lines of the form"),
        ([""], r"my\.yaml:1: expected lines of the form"),
        (["value.near: 0", "a: b: c"], r"my\.yaml:2: broken YAML"),
    ],
)
def test_what_is_wrong_with_the_file_is_said(preset, lines, problem):
    with pytest.raises(InputError, match=problem):
        score_call([GOLD], [GOLD], TOOLS, preset=preset(*lines))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"no\.yml: cannot be read"):
        score_call([GOLD], [GOLD], TOOLS, preset=tmp_path / "no.yml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match=r"bytes\.yaml: broken YAML"):
        score_call([GOLD], [GOLD], TOOLS, preset=tmp_path / "bytes.yaml")
