import random
import time
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttpa.esm.matching import best_assignment

MATRICES = st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(
    lambda size: st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]) | st.floats(0, 1), min_size=size[1], max_size=size[1]),
        min_size=size[0],
        max_size=size[0],
    )
)


def total(score, pairs):
    return sum(score[i][j] for i, j in pairs)


def best_by_search(score):
    rows, columns = len(score), len(score[0])
    if rows <= columns:
        return max(total(score, enumerate(p)) for p in permutations(range(columns), rows))
    return max(total(score, [(i, j) for j, i in enumerate(p)]) for p in permutations(range(rows), columns))


@settings(deadline=None)
@given(MATRICES)
def test_agrees_with_trying_everything(score):
    pairs = best_assignment(score)
    assert len(pairs) == min(len(score), len(score[0])) and pairs == sorted(pairs)
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    assert total(score, pairs) == pytest.approx(best_by_search(score), abs=1e-12)


def test_the_greedy_choice_is_not_taken():
    assert best_assignment([[0.9, 0.8], [0.8, 0.1]]) == [(0, 1), (1, 0)]


def test_nothing_to_assign():
    assert best_assignment([]) == best_assignment([[], []]) == []


def test_thirty_by_thirty_is_quick():
    rng = random.Random(0)
    score = [[rng.random() for _ in range(30)] for _ in range(30)]
    start = time.perf_counter()
    assert len(best_assignment(score)) == 30
    assert time.perf_counter() - start < 1.0
