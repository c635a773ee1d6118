"""Statistics of a token become a score, and floors say which tokens are worth one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from decoded_paths import decoded

from ttpa.sampling.options import SamplingOptions
from ttpa.sampling.rules import FIRST, RULES, alternatives

EVEN = (1.0, [(5, 0.5), (6, 0.25), (7, 0.125), (8, 0.0078125)])


def of_distribution(p):
    """A path of one token, drawn from a known distribution, with the statistics worked out in float64."""
    p = np.sort(np.asarray(p, dtype=np.float64))[::-1]
    entropy = float(-(p * np.log(p)).sum())
    varentropy = float((p * (np.log(p) + entropy) ** 2).sum())
    return decoded((entropy, list(enumerate(p.tolist()))), varentropy=[varentropy])


def score(rule, path, at=0):
    return RULES[rule](path, at)


def test_rules_of_a_tie_and_of_a_likely_token():
    tie, sure = of_distribution([0.5, 0.5]), of_distribution([0.75] + [0.0625] * 4)
    assert score("entropy", tie) == pytest.approx(math.log(2))
    assert score("entropy", sure) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.0625))
    assert (score("gap", tie), score("gap", sure)) == (1.0, 1 - 0.75 + 0.0625)
    assert score("surprise", tie) == pytest.approx(math.log(2))
    assert score("surprise", sure) == pytest.approx(-math.log(0.75))
    assert score("varentropy", tie) == pytest.approx(0.0)
    # a variance of two values of log p, 0.75 and 0.25 of the mass
    assert score("varentropy", sure) == pytest.approx(0.75 * 0.25 * math.log(0.75 / 0.0625) ** 2)


def test_gap_is_that_of_the_likeliest_tokens_and_surprise_that_of_the_token_taken():
    drawn = replace(decoded(EVEN), ids=[7], logps=[math.log(0.125)])
    assert score("gap", drawn) == 0.75
    assert score("surprise", drawn) == pytest.approx(math.log(8))


def test_change_is_measured_against_the_first_tokens_before():
    path = decoded(*[(entropy, EVEN[1]) for entropy in [0.25, 0.75] * (FIRST // 2) + [9.0, 1.0]])
    assert score("change", path, 0) == 0.25
    assert score("change", path, 1) == 0.5
    assert score("change", path, 2) == pytest.approx(0.25 - 0.5)
    assert score("change", path, FIRST) == pytest.approx(9.0 - 0.5)
    assert score("change", path, FIRST + 1) == pytest.approx(1.0 - 0.5), "the 9 is not among the first tokens"


def others(step, **options):
    return alternatives(decoded(step), 0, options=SamplingOptions(**options))


def test_alternatives_are_the_likeliest_other_tokens():
    assert others(EVEN) == [(6, 0.25), (7, 0.125)]
    assert others(EVEN, alternatives=1) == [(6, 0.25)]
    assert others(EVEN, alternatives=9) == [(6, 0.25), (7, 0.125)], "1/128 is less than min_probability"
    drawn = replace(decoded(EVEN), ids=[6])
    assert alternatives(drawn, 0, options=SamplingOptions()) == [(5, 0.5), (7, 0.125)]


@pytest.mark.parametrize(
    ("step", "options", "met"),
    [
        ((0.0625, EVEN[1]), {"min_entropy": 0.063}, {"min_entropy": 0.0625}),
        ((1.0, [(5, 0.75), (6, 0.125)]), {"min_probability": 0.126}, {"min_probability": 0.125}),
        ((1.0, [(5, 0.75), (6, 0.1875)]), {"min_ratio": 0.26}, {"min_ratio": 0.25}),
    ],
    ids=["entropy", "probability", "ratio"],
)
@pytest.mark.parametrize("rule", ["entropy", "surprise", "change", "varentropy"])
def test_floors_hold_under_every_rule(rule, step, options, met):
    assert others(step, rule=rule, **options) == []
    assert others(step, rule=rule, **met) != []


def test_a_forced_token_has_no_alternatives():
    free = {"min_entropy": 0.0, "min_probability": 0.0, "min_ratio": 0.0}
    assert others((0.5, [(5, 0.995001), (6, 0.004)]), **free) == []
    assert others((0.5, [(5, 0.994), (6, 0.004)]), **free) != []


def test_tokens_without_probability_are_not_tried():
    assert others((1.0, [(5, 0.5), (6, 0.25), (7, 0.0)]), min_probability=0.0, alternatives=9) == [(6, 0.25)]
    assert others((1.0, [(5, 1.0), (6, 0.0)]), min_probability=0.0) == []


@pytest.mark.parametrize(
    ("probabilities", "kept"),
    [([0.375, 0.3125, 0.265625], [6, 7]), ([0.375, 0.3125, 0.25], [6]), ([0.46875, 0.3125], []), ([0.4375, 0.3], [6])],
)
def test_gap_holds_each_alternative_to_its_thresholds(probabilities, kept):
    step = (1.0, list(zip((5, 6, 7), probabilities, strict=False)))
    assert [token for token, _ in others(step, rule="gap")] == kept
    assert len(others(step)) == len(probabilities) - 1
