from __future__ import annotations

import math

import pytest

from ttpa.errors import InputError
from ttpa.losses import ALIASES, LOSSES, LossOptions, LossTerm, describe, loss_terms, packed_leaves


def test_terms_have_a_weight_each():
    options = LossOptions(label_smoothing=0.1)
    assert loss_terms("ttpa, sft", "1,20", options=options) == [LossTerm("ttpa", 1.0), LossTerm("sft", 20.0)]
    assert loss_terms("tdpo2", options=LossOptions()) == [LossTerm("tdpo2", 1.0)]
    assert loss_terms("dpo", "0.5", options=options) == [LossTerm("sigmoid", 0.5)]
    assert all(describe(alias) is LOSSES[name] for alias, name in ALIASES.items())


@pytest.mark.parametrize(
    ("loss_type", "loss_weights", "message"),
    [
        ("sigmiod", None, r"--loss_type: there is no loss 'sigmiod'; did you mean sigmoid\?"),
        ("ttpa,nca", None, r"no loss 'nca'; did you mean nca_pair\?"),
        ("qqqq", None, "choose of sigmoid, ttpa, .*, likelihood, dpo"),
        ("ttpa,", None, "there is no loss ''"),
        ("ttpa,sft", "1", "--loss_weights has 1 numbers for 2 losses"),
        ("ttpa", "1,2", "--loss_weights has 2 numbers for 1 losses"),
        ("ttpa,sft", "1,two", "--loss_weights: 'two' is not a number above 0"),
        ("ttpa,sft", "1,0", "--loss_weights: '0' is not a number above 0"),
        ("ttpa,sft", "1,inf", "--loss_weights: 'inf' is not a number above 0"),
        ("dpo,sigmoid", None, "--loss_type dpo,sigmoid has a loss twice"),
        ("likelihood,ttpa", None, "likelihood takes every leaf on its own and cannot be added to ttpa"),
        ("sft,likelihood", None, "likelihood takes every leaf on its own and cannot be added to sft"),
    ],
)
def test_terms_that_make_no_sense_are_refused(loss_type, loss_weights, message):
    with pytest.raises(InputError, match=message):
        loss_terms(loss_type, loss_weights, options=LossOptions())


def test_label_smoothing_needs_a_term_that_reads_it():
    smooth = LossOptions(label_smoothing=0.1)
    with pytest.raises(InputError, match=r"--label_smoothing goes with sigmoid, ttpa, robust, .* not with hinge,sft"):
        loss_terms("hinge,sft", options=smooth)
    assert len(loss_terms("hinge,robust", options=smooth)) == 2


@pytest.mark.parametrize(("names", "leaves"), [("sft", "chosen"), ("likelihood", "all"), ("sft,ipo", "pairs")])
def test_only_the_leaves_that_some_term_reads_are_packed(names, leaves):
    assert packed_leaves([LossTerm(name) for name in names.split(",")]) == leaves


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("beta", 0.0),
        ("beta", math.inf),
        ("label_smoothing", 0.5),
        ("label_smoothing", -0.1),
        ("simpo_gamma", -1.0),
        ("ld_alpha", 1.1),
        ("tis_min", math.nan),
        ("tis_mu", -1.0),
        ("d2po_gamma", 0.0),
        ("sepo_ratio", 1.01),
        ("discopop_tau", 0.0),
        ("likelihood_temperature", 0.0),
    ],
)
def test_options_outside_their_range_are_refused_by_name(option, value):
    with pytest.raises(InputError, match=f"--{option} must be a .*not {value}"):
        LossOptions(**{option: value})


def test_the_range_of_tis_must_not_be_empty():
    with pytest.raises(InputError, match=r"--tis_min 2.0 must not be above --tis_max 1.5"):
        LossOptions(tis_min=2.0)


def test_every_option_is_read_by_some_loss():
    assert {option for loss in LOSSES.values() for option in loss.options} == set(vars(LossOptions()))
