"""A part of what tests/fuzz_score.py does at large."""

from __future__ import annotations

import time

import fuzz_score
import pytest
from dialect_writers import WRITERS

from ttpa.esm.errors import PENALTY, Score


def test_twenty_thousand_outputs_are_scored():
    outcome = fuzz_score.fuzz(20_000, limit=5.0)
    assert outcome.valid + outcome.wrong == 20_000 and outcome.valid > 1000
    assert outcome.codes == set(PENALTY), "every kind of error is among them"


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (lambda *a, **k: 1 / 0, "ZeroDivisionError"),
        (lambda *a, **k: time.sleep(10), "the scorer hangs"),
        (lambda *a, **k: Score(2.0, True, []), "score=2.0"),
    ],
)
def test_an_output_that_is_not_scored_is_named(monkeypatch, broken, problem):
    monkeypatch.setattr(fuzz_score, "score_call", broken)
    with pytest.raises(AssertionError, match=problem) as raised:
        fuzz_score.fuzz(1, first=7, limit=0.1)
    assert "output 7 of seed 0" in str(raised.value)


def test_an_ordinary_call_is_quick():
    """0.3 ms on a machine of its own (the script prints the table); here others may be busy."""
    for dialect in WRITERS:
        assert fuzz_score.ordinary_milliseconds(dialect, "strict", repeats=50) < 1.5
