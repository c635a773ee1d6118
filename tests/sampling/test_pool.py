"""Pages of a cache: whatever is forked, written, cut and released, every sequence reads what it wrote."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ttpa.sampling.pool import PagedSequence, PagePool


class Memory:
    """Slots that stand for keys and values, and the sequences in them with what each must read."""

    def __init__(self, num_pages, page_size):
        self.pool = PagePool(num_pages=num_pages + 1, page_size=page_size)
        self.pages = np.zeros((num_pages + 1, page_size), dtype=np.int64)
        self.expected: dict[PagedSequence, list[int]] = {}
        self.written = 0

    def start(self):
        sequence = PagedSequence()
        self.expected[sequence] = []
        return sequence

    def write(self, sequence, number):
        """Append values that no other write has."""
        self.pool.grow(sequence, sequence.length + number)
        for _ in range(number):
            self.written += 1
            page, offset = divmod(sequence.length, self.pool.page_size)
            self.pages[sequence.pages[page], offset] = self.written
            self.expected[sequence].append(self.written)
            sequence.length += 1

    def fork(self, parent, at):
        child, copy = self.pool.fork(parent, at)
        if copy is not None:
            source, target = copy
            self.pages[target] = self.pages[source]
        self.expected[child] = self.expected[parent][:at]
        return child

    def cut(self, sequence, length):
        sequence.cut(length)
        del self.expected[sequence][length:]

    def release(self, sequence):
        self.pool.release(sequence)
        del self.expected[sequence]

    def read(self, sequence):
        return self.pages[sequence.pages].flatten()[: sequence.length].tolist()

    def check(self):
        """Every sequence reads its own, pages are counted, and none is shared but full ones."""
        pool, holders = self.pool, Counter(page for sequence in self.expected for page in sequence.pages)
        for sequence, values in self.expected.items():
            assert self.read(sequence) == values
            assert len(set(sequence.pages)) == len(sequence.pages) >= pool.pages_for(sequence.length)
            partial = sequence.pages[sequence.length // pool.page_size :]
            assert all(holders[page] == 1 for page in partial), "what is yet to be written belongs to one"
        assert pool.references[1:].tolist() == [holders[page] for page in range(1, pool.num_pages + 1)]
        assert pool.num_used == len(holders) <= pool.most_used <= pool.num_pages
        assert holders[0] == 0, "page 0 is nobody's"


class AnySequenceOfSteps(RuleBasedStateMachine):
    """Some pages, and steps in any order; what does not fit is refused and changes nothing."""

    @initialize(num_pages=st.integers(1, 14), page_size=st.integers(1, 5))
    def begin(self, num_pages, page_size):
        self.memory = Memory(num_pages, page_size)
        self.shared_below: dict[PagedSequence, int] = {}

    @rule()
    def start(self):
        self.memory.start()

    @rule(data=st.data(), number=st.integers(0, 9))
    def write(self, data, number):
        sequence, pool = self.any_sequence(data), self.memory.pool
        if pool.pages_for(sequence.length + number) - len(sequence.pages) <= pool.num_free:
            self.memory.write(sequence, number)
        else:
            with pytest.raises(AssertionError, match="promised"):
                self.memory.write(sequence, number)

    @rule(data=st.data())
    def fork(self, data):
        parent, pool = self.any_sequence(data), self.memory.pool
        at, used = data.draw(st.integers(0, parent.length)), pool.num_used
        full, rest = divmod(at, pool.page_size)
        if rest and not pool.num_free:
            with pytest.raises(AssertionError, match="promised"):
                self.memory.fork(parent, at)
            return
        child = self.memory.fork(parent, at)
        assert child.pages[:full] == parent.pages[:full] and len(child.pages) == full + bool(rest)
        assert child.length == at and pool.num_used == used + bool(rest)
        self.shared_below[child] = full * pool.page_size

    @rule(data=st.data())
    def cut(self, data):
        sequence = self.any_sequence(data)
        least = max(sequence.forked, self.shared_below.get(sequence, 0))
        self.memory.cut(sequence, data.draw(st.integers(least, sequence.length)))

    @rule(data=st.data())
    def release(self, data):
        self.memory.release(self.any_sequence(data))

    def any_sequence(self, data):
        sequences = list(self.memory.expected) or [self.memory.start()]
        return sequences[data.draw(st.integers(0, len(sequences) - 1))]

    @invariant()
    def holds(self):
        if hasattr(self, "memory"):
            self.memory.check()

    def teardown(self):
        if hasattr(self, "memory"):
            for sequence in list(self.memory.expected):
                self.memory.release(sequence)
            assert self.memory.pool.num_used == 0 and self.memory.pool.num_free == self.memory.pool.num_pages
            assert not self.memory.pool.references[1:].any()


AnySequenceOfSteps.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestAnySequenceOfSteps = AnySequenceOfSteps.TestCase


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_fork_at_every_past_position_reads_what_stood_there(page_size):
    length = 37
    memory = Memory(200, page_size)
    parent = memory.start()
    memory.write(parent, length)
    children = [memory.fork(parent, at) for at in range(length + 1)]
    memory.check()
    own = memory.pool.num_used - memory.pool.pages_for(length)
    assert own == sum(at % page_size > 0 for at in range(length + 1)), "one page each, none at the end of a page"
    for sequence in [parent, *children]:
        memory.write(sequence, 3)
    memory.check()
    memory.release(parent)
    memory.check()
    grandchild = memory.fork(children[20], 22)
    memory.write(grandchild, page_size)
    memory.check()


def test_neighbouring_pages_are_given_where_there_are_some():
    memory = Memory(9, 4)
    first, second, third = (memory.start() for _ in range(3))
    for sequence, pages in ((first, 2), (second, 1), (third, 4)):
        memory.write(sequence, 4 * pages)
    memory.release(second)
    memory.write(first, 8)
    assert np.diff(first.pages[2:]).tolist() == [1], "the two behind the others, not the one between and another"
    memory.write(third, 4)
    with pytest.raises(AssertionError, match="promised"):
        memory.write(third, 1)


def test_a_child_cannot_be_cut_below_the_pages_that_it_shares():
    memory = Memory(9, 4)
    parent = memory.start()
    memory.write(parent, 11)
    child = memory.fork(parent, 10)
    memory.cut(child, 8)
    with pytest.raises(AssertionError):
        memory.cut(child, 7)


def test_the_beginning_that_was_forked_cannot_be_cut():
    memory = Memory(9, 4)
    parent = memory.start()
    memory.write(parent, 11)
    memory.fork(parent, 6)
    memory.cut(parent, 6)
    with pytest.raises(AssertionError, match="never written again"):
        memory.cut(parent, 5)


def test_only_what_is_written_can_be_forked():
    memory = Memory(9, 4)
    parent = memory.start()
    memory.write(parent, 5)
    with pytest.raises(AssertionError, match="written"):
        memory.fork(parent, 6)
