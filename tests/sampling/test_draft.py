"""What a branch may go on with is guessed from the path that it was forked from."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from ttpa.sampling.draft import PAUSE, Draft

TRUNK = list('{"name": "weather", "arguments": {"city": "Rome", "days": 2, "unit": "C"}}')
AT = TRUNK.index("R")


def verify(draft, branch, *, room=None):
    """Write a branch as the sampler does: every pass checks a proposal and adds one token. Returns each proposal, as
    (tokens before it, the tokens, how many were right)."""
    own, proposals = branch[:1], []
    while len(own) < len(branch):
        proposed = draft.propose(own)[:room]
        rest = branch[len(own) : len(branch) - 1]
        right = next((i for i, (a, b) in enumerate(zip(proposed, rest, strict=False)) if a != b), len(rest))
        right = min(right, len(proposed))
        proposals.append((len(own), "".join(map(str, proposed)), right))
        draft.tell(len(proposed), right)
        own = branch[: len(own) + right + 1]
    return proposals


def test_the_first_guess_is_what_the_trunk_goes_on_with():
    assert Draft(TRUNK, at=AT, token="O").propose(["O"]) == TRUNK[AT + 1 : AT + 33]
    assert Draft(TRUNK, at=AT, token="O", longest=5).propose(["O"]) == TRUNK[AT + 1 : AT + 6]
    assert Draft(TRUNK, at=len(TRUNK) - 1, token="]").propose(["]"]) == []


def test_a_branch_that_repeats_the_trunk_takes_one_pass_for_each_guess():
    branch = ["L", *TRUNK[AT + 1 :]]
    proposals = verify(Draft(TRUNK, at=AT, token="L", longest=10), branch)
    assert len(proposals) == -(-(len(branch) - 1) // 11)
    assert [before for before, _, _ in proposals] == list(range(1, len(branch), 11))
    assert all(right == 10 for _, _, right in proposals[:-1])


def test_a_branch_with_another_value_meets_the_trunk_again_behind_it():
    for value in ("Oslo", "Reykjavik", "Ulm"):
        own = [*value, *TRUNK[AT + 4 :]]
        proposals = verify(Draft(TRUNK, at=AT, token=own[0], longest=100), own)
        tried = [proposal for proposal in proposals if proposal[1]]
        assert tried[1:] == [(len(value) + 2, "".join(TRUNK[AT + 6 :]), len(own) - len(value) - 3)]
        assert len(proposals) == len(value) + 2


def test_the_first_of_several_places_is_where_the_branch_goes_on():
    trunk = list("a(x, x, x, y)")
    draft = Draft(trunk, at=2, token="z")
    draft.propose(["z"])
    draft.tell(10, 0)
    assert draft.propose(list("z-, ")) == list("x, x, y)")
    assert draft.propose(list("z-, x, ")) == list("x, y)")
    assert draft.propose(list("z-, x, zz, ")) == list("y)"), "places behind the last one only"
    assert Draft(list("abcd"), at=0, token="z").propose(list("zb-bc")) == [], "b stands before the place"


def test_a_place_is_not_sought_further_than_a_guess_is_long():
    trunk = [0, *range(100, 200)]
    own = [1, 2, 150, 151]
    assert Draft(trunk, at=0, token=1, longest=52).propose(own) == list(range(152, 200))[:52]
    assert Draft(trunk, at=0, token=1, longest=51).propose(own) == []


WRONG, RIGHT = [0, 1, 9], [0, 1, 2]
"""Beside a trunk of the latter: 0 and 1 are a place each time, and behind it a guess is wrong, or right."""


def test_after_two_wrong_guesses_in_a_row_tokens_are_written_one_by_one_for_a_while():
    proposals = verify(Draft(RIGHT * 100, at=0, token=9), [9, *WRONG * 60])
    tried = [(before, right) for before, proposed, right in proposals if proposed]
    assert all(right == 0 for _, right in tried)
    gaps = [b - a for (a, _), (b, _) in pairwise(tried)]
    assert gaps[0] == 2 and PAUSE < gaps[1] < gaps[2] < gaps[3]


def test_a_right_guess_ends_the_pauses():
    proposals = verify(Draft(RIGHT * 100, at=0, token=9), [9, *WRONG * 5, *RIGHT * 20, *WRONG * 5])
    tried = [(before, right) for before, proposed, right in proposals if proposed]
    last_right = max(i for i, (_, right) in enumerate(tried) if right)
    wrong = [before for before, _ in tried[last_right + 1 :]]
    assert len(wrong) > 1 and wrong[1] - wrong[0] == 3, "the second is tried at once"


def test_nothing_told_changes_nothing():
    told, untold = (Draft(TRUNK, at=AT, token="O") for _ in range(2))
    for _ in range(3):
        told.tell(0, 0)
    assert told.propose(["O"]) == untold.propose(["O"])


token = st.integers(0, 3)


@settings(max_examples=200, deadline=None)
@given(st.lists(token, min_size=1, max_size=60), st.lists(token, min_size=1, max_size=60), st.data())
def test_every_guess_stands_in_the_trunk_and_every_branch_is_written(trunk, branch, data):
    at = data.draw(st.integers(0, len(trunk) - 1))
    longest = data.draw(st.integers(1, 8))
    room = data.draw(st.one_of(st.none(), st.integers(1, 8)))
    proposals = verify(Draft(trunk, at=at, token=branch[0], longest=longest), branch, room=room)
    text = "".join(map(str, trunk))
    for _, proposed, _ in proposals:
        assert proposed in text and len(proposed) <= longest
    assert proposals == [] or proposals[-1][0] + proposals[-1][2] + 1 == len(branch)
