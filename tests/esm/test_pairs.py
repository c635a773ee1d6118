from ttpa.esm.pairs import release_pairs, strict_pairs
from ttpa.trees.record import Leaf, Pair


def leaf(score, city=None, kind="branch", errors=()):
    calls = [] if city is None else [{"name": "w", "arguments": {"city": city}}]
    errors = [{"code": code, "call": 0, "pointer": "/city", "tokens": [0, 1]} for code in errors]
    return Leaf(node=0, kind=kind, calls=calls, score=score, errors=errors)


GOLD = leaf(1.0, "Oslo", "gold")


def sides(pairs):
    return [(pair.chosen, pair.rejected) for pair in pairs]


def test_strict_gold_over_every_sample():
    assert strict_pairs([GOLD, leaf(0.5, "Rome", "trunk"), leaf(0.9, "oslo"), leaf(0.0)]) == [
        Pair(0, 1, 0.5),
        Pair(0, 2, 1.0 - 0.9),
        Pair(0, 3, 1.0),
    ]


def test_strict_prefers_the_first_exact_sample_and_never_pairs_two_exact_leaves():
    leaves = [GOLD, leaf(0.5, "Rome", "trunk"), leaf(1.0, "Oslo"), leaf(1.0, "Oslo"), leaf(0.0)]
    assert sides(strict_pairs(leaves)) == [(2, 1), (2, 4)]
    assert strict_pairs([GOLD, leaf(1.0, "Oslo")]) == []


def test_strict_needs_gold_or_an_exact_sample():
    assert strict_pairs([leaf(0.5, "Rome"), leaf(0.9, "oslo")]) == []
    assert sides(strict_pairs([leaf(0.5, "Rome"), leaf(1.0, "Oslo")])) == [(1, 0)]


def test_strict_takes_equal_wrong_calls_once_and_texts_each():
    wrong = leaf(0.5, "Rome", errors=["value.wrong"])
    loose = leaf(0.45, "Rome", errors=["format.repairable", "value.wrong"])
    assert sides(
        strict_pairs([GOLD, wrong, leaf(0.5, "Rome", errors=["value.wrong"]), loose, leaf(0.0), leaf(0.0)])
    ) == [
        (0, 1),
        (0, 3),
        (0, 4),
        (0, 5),
    ]


def test_release_gold_over_all_samples_below_the_threshold():
    assert release_pairs([GOLD, leaf(0.79, "Rome"), leaf(0.5, "x"), leaf(0.0)]) == [
        Pair(0, 1, 1.0 - 0.79),
        Pair(0, 2, 0.5),
        Pair(0, 3, 1.0),
    ]


def test_release_last_best_sample_over_worse_ones_and_over_those_without_a_call():
    leaves = [GOLD, leaf(0.9, "a"), leaf(0.8, "b"), leaf(0.9, "c"), leaf(0.0)]
    assert release_pairs(leaves) == [Pair(3, 2, 0.9 - 0.8), Pair(3, 4, 0.9)]


def test_release_threshold_is_inclusive_and_gold_is_no_sample():
    assert sides(release_pairs([GOLD, leaf(0.8, "a"), leaf(0.0)])) == [(1, 2)]
    assert sides(release_pairs([GOLD, leaf(0.8, "a"), leaf(0.8, "b")])) == []


def test_release_counts_equal_calls_once():
    leaves = [GOLD, leaf(0.9, "a"), leaf(0.9, "b"), leaf(0.9, "a"), leaf(0.5, "c"), leaf(0.5, "c")]
    assert sides(release_pairs(leaves)) == [(2, 4)]


def test_release_gold_leaf_that_was_sampled_too():
    leaves = [GOLD, leaf(0.9, "a"), leaf(0.0)]
    assert sides(release_pairs(leaves)) == [(1, 2)]
    assert sides(release_pairs(leaves, gold_sampled=True)) == [(0, 1), (0, 2)]


def test_release_without_samples_or_gold():
    assert release_pairs([GOLD]) == release_pairs([leaf(0.5, "a"), leaf(0.0)]) == []
