"""Intervals against published values and against exact sums."""

from __future__ import annotations

import math

import pytest

from ttpa.evaluation.intervals import Z95, mean_interval, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_paired_differences_have_the_interval_of_mcnemar():
    n, gained, lost = 200, 30, 12
    mean, low, high = mean_interval([1] * gained + [-1] * lost + [0] * (n - gained - lost))
    half = Z95 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    assert (mean, low, high) == pytest.approx((18 / n, 18 / n - half, 18 / n + half))


def test_equal_values_have_no_width():
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
