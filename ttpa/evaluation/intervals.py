"""Confidence intervals of shares and of paired differences, at 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a share, (c - h, c + h) with c = (p + z^2 / 2n) / (1 + z^2 / n) and
    h = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n) (Wilson 1927); trials must be positive."""
    assert 0 <= successes <= trials and trials > 0
    p, z2 = successes / trials, Z95 * Z95 / trials
    centre = (p + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95 % interval by the normal approximation, m -+ z sd / sqrt(n) with the population's sd. For
    differences in {-1, 0, 1}, n01 of them 1 and n10 of them -1, this is (n01 - n10) / n -+
    z sqrt(n01 + n10 - (n01 - n10)^2 / n) / n, the interval that belongs to McNemar's test. The interval has no width
    where all values are equal; values must not be empty."""
    assert values
    mean = math.fsum(values) / len(values)
    half = Z95 * math.sqrt(math.fsum((v - mean) ** 2 for v in values)) / len(values)
    return mean, mean - half, mean + half
