"""Two evaluations side by side."""

from __future__ import annotations

import pytest

from ttpa.errors import InputError
from ttpa.evaluation import Evaluation, Outcome, compare, comparison_table, evaluation_table


def outcomes(marks, splits=("all",)):
    """One outcome per letter: x exact, n a wrong name, v a wrong value."""
    codes = {"x": [], "n": ["tool.wrong"], "v": ["value.wrong"]}
    score = {"x": 1.0, "n": 0.0, "v": 0.5}
    found = [
        Outcome(f"d{i}", splits[i % len(splits)], score[mark], codes[mark], "stop", 7) for i, mark in enumerate(marks)
    ]
    return Evaluation(found)


def test_differences_are_paired():
    found = compare(outcomes("xxnnvv"), outcomes("xvxnxx"))
    assert (found.decisions, found.gained, found.lost) == (6, 3, 1)
    assert found.points == pytest.approx(100 * 2 / 6)
    assert found.interval[0] < found.points < found.interval[1]
    assert found.score == pytest.approx((0 - 0.5 + 1 + 0 + 0.5 + 0.5) / 6)
    assert found.to_dict()["interval"] == list(found.interval)


def test_order_does_not_matter_and_decisions_do():
    before, after = outcomes("xnv"), outcomes("xxv")
    after.outcomes.reverse()
    assert (compare(before, after).gained, compare(before, after).lost) == (1, 0)
    with pytest.raises(InputError, match="3 and 2 decisions, 2 in common"):
        compare(before, outcomes("xx"))
    with pytest.raises(InputError, match="same dialogues"):
        compare(outcomes(""), outcomes(""))


def test_summary():
    record = outcomes("xxnv", splits=("a", "b")).to_dict()
    assert (record["decisions"], record["exact_calls"], record["exact_share"]) == (4, 2, 0.5)
    assert record["exact_interval"][0] < 0.5 < record["exact_interval"][1]
    assert record["esm_score"] == pytest.approx(0.625)
    assert record["errors"] == {"tool.wrong": 1, "value.wrong": 1} and record["decoded_tokens"] == 28
    assert {name: part["exact_calls"] for name, part in record["splits"].items()} == {"a": 1, "b": 1}
    assert "splits" not in outcomes("xx").to_dict()
    assert outcomes("").to_dict()["exact_share"] is None


def test_table():
    lines = comparison_table(outcomes("xxnnvvvv", ("a", "b")), outcomes("xxxnvvvx", ("a", "b"))).splitlines()
    assert lines[0].split() == ["before", "after", "difference"]
    assert lines[1].startswith("exact calls, %") and "25.0 [" in lines[1] and "50.0 [" in lines[1]
    assert "+25.0 [" in lines[1]
    assert lines[2].split()[:4] == ["ESM", "score", "0.5000", "0.6875"]
    assert [line.split()[3] for line in lines[3:5]] == ["a", "b"]
    assert [line.split() for line in lines[5:]] == [["value.wrong", "4", "3", "-1"], ["tool.wrong", "2", "1", "-1"]]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"


def test_table_of_one_evaluation():
    lines = evaluation_table(outcomes("xn")).splitlines()
    assert lines[0].split() == ["decisions", "2"] and lines[-1].split() == ["tool.wrong", "1"]
    assert evaluation_table(outcomes("")).split() == ["decisions", "0"]
