"""Options of the sampler that make no sense are refused by name."""

from __future__ import annotations

import dataclasses

import pytest

from ttpa.errors import InputError
from ttpa.sampling.options import SamplingOptions

EDGES = {
    "num_forks": (0, -1),
    "alternatives": (1, 0),
    "min_distance": (1, 0),
    "min_entropy": (0.0, -0.1),
    "min_probability": (1.0, 1.01),
    "min_ratio": (1.0, 1.01),
    "max_leaves": (2, 1),
    "max_depth": (1, 0),
    "max_tree_tokens": (256, 255),
    "max_tree_pages": (1, 0),
    "num_samples": (1, 0),
    "max_new_tokens": (1, 0),
    "temperature": (0.0, -0.5),
    "rows": (1, 0),
    "cache_gb": (0.001, 0.0),
    "seed": (0, -1),
}
FILTER_EDGES = {"top_k": [(1, 0), (64, 65)], "top_p": [(1.0, 1.01), (0.01, 0.0)], "min_p": [(1.0, 1.01), (0.01, 0.0)]}


@pytest.mark.parametrize("name", EDGES)
def test_the_first_value_that_makes_no_sense_is_refused_by_name(name):
    good, bad = EDGES[name]
    assert getattr(SamplingOptions(**{name: good}), name) == good
    with pytest.raises(InputError, match=rf"^{name} .*{bad}"):
        SamplingOptions(**{name: bad})


@pytest.mark.parametrize("name", FILTER_EDGES)
def test_filters_have_their_ranges_and_need_a_temperature(name):
    for good, bad in FILTER_EDGES[name]:
        assert getattr(SamplingOptions(temperature=0.7, **{name: good}), name) == good
        assert getattr(SamplingOptions(mode="release", **{name: good}), name) == good
        with pytest.raises(InputError, match=rf"^{name} must be .*{bad}"):
            SamplingOptions(temperature=0.7, **{name: bad})
        with pytest.raises(InputError, match=f"^{name} filters draws.*give a temperature"):
            SamplingOptions(**{name: good})


def test_alternatives_cannot_be_more_than_the_tokens_that_are_known():
    assert SamplingOptions(alternatives=19).alternatives == 19
    with pytest.raises(InputError, match="alternatives must be at most 19, not 64"):
        SamplingOptions(alternatives=64)


@pytest.mark.parametrize("name", ["min_entropy", "temperature", "cache_gb", "max_new_tokens"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(name, value):
    with pytest.raises(InputError, match=f"^{name} must be a number"):
        SamplingOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("mode", "tsp", "did you mean tps?"),
        ("rule", "entropie", "did you mean entropy?"),
        ("rule", "release", "one of entropy, gap, surprise, change, varentropy, not 'release'"),
        ("fork_order", "frist", "did you mean first?"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(name, value, said):
    with pytest.raises(InputError, match=f"^{name} must be") as refusal:
        SamplingOptions(**{name: value})
    assert said in str(refusal.value)


def test_a_budget_of_tokens_holds_a_trunk():
    assert SamplingOptions(max_new_tokens=64, max_tree_tokens=64).max_tree_tokens == 64
    with pytest.raises(InputError, match=r"max_tree_tokens is 63, .*64 new tokens.*lower max_new_tokens"):
        SamplingOptions(max_new_tokens=64, max_tree_tokens=63)


def test_an_empty_stop_text_is_refused():
    assert SamplingOptions(stop="</tool_call>").stop == "</tool_call>"
    with pytest.raises(InputError, match="stop is empty"):
        SamplingOptions(stop="")


def test_samples_of_mode_release_are_drawn_at_temperature_1_unless_told():
    assert SamplingOptions().draw_temperature == 0.0
    assert SamplingOptions(temperature=0.7).draw_temperature == 0.7
    assert SamplingOptions(mode="release").draw_temperature == 1.0
    assert SamplingOptions(mode="release", temperature=0.7).draw_temperature == 0.7


def test_options_that_are_replaced_are_checked_again():
    with pytest.raises(InputError, match="max_leaves"):
        dataclasses.replace(SamplingOptions(), max_leaves=0)
