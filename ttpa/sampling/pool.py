"""Pages of a key-value cache: handed out, shared between sequences, counted, given back.

Position p of a sequence lies in page `pages[p // page_size]`. The cache is append-only: what stands below the length of
a sequence is never written again, so a sequence can be forked at any past position. Full pages are shared by the two,
the page in which they part is copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(eq=False)
class PagedSequence:
    """The pages of one sequence, in order; the first `length` positions are written. Others may share what stands
    below `forked`, so the length never falls below it again."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    forked: int = 0

    def cut(self, length: int) -> None:
        """Forget what stands from position `length` on; its room stays."""
        assert self.forked <= length <= self.length, "what others may share is never written again"
        self.length = length


class PagePool:
    """`num_pages` pages of `page_size` positions; page 0 is never handed out (rows without work write there)."""

    def __init__(self, *, num_pages: int, page_size: int) -> None:
        assert num_pages > 1 and page_size > 0
        self.page_size = page_size
        self.references = np.zeros(num_pages, dtype=np.int32)
        self.references[0] = 1
        self.num_free = num_pages - 1
        self.most_used = 0

    @property
    def num_pages(self) -> int:
        """Pages that can be handed out."""
        return len(self.references) - 1

    @property
    def num_used(self) -> int:
        """Pages that some sequence holds."""
        return self.num_pages - self.num_free

    def pages_for(self, length: int) -> int:
        """How many pages hold so many positions."""
        return -(-length // self.page_size)

    def grow(self, sequence: PagedSequence, length: int) -> None:
        """Give a sequence room for `length` positions."""
        sequence.pages += self._take(self.pages_for(length) - len(sequence.pages))

    def fork(self, parent: PagedSequence, at: int) -> tuple[PagedSequence, tuple[int, int] | None]:
        """A sequence that goes on from position `at` of another one, and the page that has to be copied for it, as
        (from, to), before either of the two is released; None where they part at the end of a page."""
        assert 0 <= at <= parent.length, "only what is written can be shared"
        full, rest = divmod(at, self.page_size)
        taken = self._take(1 if rest else 0)
        shared = parent.pages[:full]
        self.references[shared] += 1
        parent.forked = max(parent.forked, at)
        child = PagedSequence(shared + taken, length=at, forked=full * self.page_size)
        return child, (parent.pages[full], taken[0]) if rest else None

    def release(self, sequence: PagedSequence) -> None:
        """Give back what a sequence holds; pages that others share stay theirs."""
        assert (self.references[sequence.pages] > 0).all(), "given back twice"
        self.references[sequence.pages] -= 1
        self.num_free += int((self.references[sequence.pages] == 0).sum())
        sequence.pages, sequence.length, sequence.forked = [], 0, 0

    def clear(self) -> None:
        """Take all pages back, whoever holds them."""
        self.references[1:] = 0
        self.num_free = self.num_pages

    def _take(self, number: int) -> list[int]:
        if number <= 0:
            return []
        assert number <= self.num_free, "more was promised than there is"
        free = np.flatnonzero(self.references == 0)
        # A run of neighbours can be read as one piece, so take the first that is long enough.
        starts = np.flatnonzero(free[number - 1 :] - free[: len(free) - number + 1] == number - 1)
        first = int(starts[0]) if len(starts) else 0
        taken = free[first : first + number]
        self.references[taken] = 1
        self.num_free -= number
        self.most_used = max(self.most_used, self.num_used)
        return taken.tolist()
