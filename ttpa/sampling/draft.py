"""What a branch may go on with: the remainder of the path it was forked from, which one pass can verify."""

from __future__ import annotations

from collections.abc import Sequence

PAUSE = 8
"""Tokens that are decoded one by one after a second draft in a row has failed, twice as many after a third, .."""


class Draft:
    """Guesses the next tokens of a branch from the tokens of the path that it was forked from, the trunk, at position
    `at` with another `token`.

    The first guess is what the trunk goes on with. While the branch writes what stands at its place in the trunk, that
    place moves along. Where they part, nothing is guessed until the last two tokens of the branch stand side by side
    in the trunk again, between its place and `longest` tokens further on; the first such pair is the new place, since
    a call goes on in the order of its text. After two guesses in a row of which nothing was right there is a pause.
    """

    def __init__(self, trunk_ids: Sequence[int], *, at: int, token: int, longest: int = 32) -> None:
        self.trunk_ids, self.longest = trunk_ids, longest
        self._place = at + 1  # in the trunk, of what the branch writes next
        self._aligned = True
        self._read, self._last = 1, token  # how many tokens of the branch were read, and the last of them
        self._failed = self._wait_until = 0

    def propose(self, own_ids: Sequence[int]) -> list[int]:
        """At most `longest` tokens that may follow `own_ids`, the tokens of the branch from the forked one on."""
        for token in own_ids[self._read :]:
            self._follow(token)
        self._read = len(own_ids)
        if not self._aligned or self._read < self._wait_until:
            return []
        return list(self.trunk_ids[self._place : self._place + self.longest])

    def tell(self, num_proposed: int, num_accepted: int) -> None:
        """How many tokens of the last proposal were tried, and how many of these were right."""
        if num_proposed:
            self._failed = 0 if num_accepted else self._failed + 1
            if self._failed > 1:
                self._wait_until = self._read + 1 + PAUSE * (self._failed - 1)

    def _follow(self, token: int) -> None:
        """Move on by one token of the branch."""
        trunk, place = self.trunk_ids, self._place
        if self._aligned and place < len(trunk) and trunk[place] == token:
            self._place += 1
        else:
            pair = [self._last, token]
            ends = range(place + 2, min(place + self.longest, len(trunk)) + 1)
            found = next((end for end in ends if list(trunk[end - 2 : end]) == pair), None)
            self._aligned = found is not None
            self._place = place if found is None else found
        self._last = token
