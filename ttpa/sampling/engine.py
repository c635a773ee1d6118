"""The loop of the sampler: many trees at once, a fixed number of rows, every row one path that is being written.

Waiting forks take free rows first, then new prompts do. A tree is let in once there are pages for its prompt, its trunk
and one branch, so that every tree that was let in can finish whatever the others do; further branches run as long as
nothing that was promised is touched. What comes next depends on what has been decoded alone, never on time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ttpa.sampling.decoded import Written
from ttpa.sampling.head import draw_key
from ttpa.sampling.options import SamplingOptions
from ttpa.sampling.passes import PAGE_SIZE, Feed, Passes
from ttpa.sampling.pool import PagedSequence
from ttpa.sampling.report import SamplingReport
from ttpa.sampling.search import Path, Search

MAX_PROMPTS = 64
"""How many prompts are remembered, so that others that begin like them need not be computed whole."""

MIN_SHARED = 64
"""Shorter beginnings are computed again: on a CPU every piece of a prompt that lies elsewhere is one more product."""

PREFILL_TOKENS = 8192
"""How many tokens of prompts go through the model in one pass, unless one prompt alone has more."""


@dataclass(frozen=True)
class Need:
    """How many pages a tree needs for its prompt, and for a path from the end of the prompt."""

    prompt: int
    path: int

    @classmethod
    def of(cls, prompt_length: int, options: SamplingOptions) -> Need:
        """The need of a tree; the last token of the prompt is fed with each path."""
        before = prompt_length - 1
        return cls(pages(before), pages(before + options.max_new_tokens) - before // PAGE_SIZE)

    def least(self, options: SamplingOptions) -> int:
        """With fewer pages the tree cannot be made."""
        return self.prompt + self.path * (2 if branches(options) else 1)

    def most(self, options: SamplingOptions) -> int:
        """More pages are never used."""
        paths = options.num_samples if options.mode == "release" else options.max_leaves if branches(options) else 1
        return self.prompt + self.path * paths

    def capacity(self, num_pages: int, options: SamplingOptions) -> int:
        """How many branches beside the trunk are promised pages: one at a time or, where branches are forked too and
        so have to stay, all that there can be room for."""
        if not branches(options):
            return 0
        room = (min(num_pages, options.max_tree_pages or num_pages) - self.prompt) // self.path - 1
        return 1 if options.max_depth == 1 else min(options.max_leaves - 1, room)


def branches(options: SamplingOptions) -> bool:
    """Whether paths are forked at all."""
    return options.mode == "tps" and options.num_forks > 0


def pages(length: int) -> int:
    """How many pages hold so many positions."""
    return -(-length // PAGE_SIZE)


@dataclass(eq=False)
class Tree:
    """A tree that was let in: its number, the pages that were promised to its paths and those that they hold now, and
    its paths without a row."""

    number: int
    search: Search
    need: Need
    reserve: int
    prompt: PagedSequence
    waiting: list[Path]
    held: int = 0

    @property
    def shared(self) -> int:
        """Positions of the prompt that stand in the same pages for all paths."""
        return self.prompt.length // PAGE_SIZE * PAGE_SIZE

    @property
    def promised(self) -> int:
        """Pages that nobody else may take."""
        return max(0, self.reserve - self.held)


class Engine:
    """Writes the paths of searches with the passes of a model; counts what it does in `report`."""

    def __init__(self, passes: Passes, *, options: SamplingOptions, report: SamplingReport) -> None:
        self.passes, self.pool, self.options, self.report = passes, passes.pool, options, report
        self.trees: dict[int, Tree] = {}
        self.rows: list[tuple[Tree, Path]] = []
        self.prompts: OrderedDict[int, tuple[np.ndarray, PagedSequence]] = OrderedDict()  # by the number of the tree
        self.prefills: list[Feed] = []
        self.admitted = 0

    def run(self, searches: Iterable[Search]) -> Iterator[Search | None]:
        """Let in the searches in their order and yield each once it is done, and None after every pass."""
        coming = iter(searches)
        upcoming = next(coming, None)
        while True:
            self._start_waiting()
            wanted = len(self.rows)
            while upcoming is not None and wanted < self.options.rows:
                tree = self._admit(upcoming)
                if tree is None:
                    break
                wanted += len(tree.waiting)
                upcoming = next(coming, None)
            self._prefill()
            self._start_waiting()
            if not self.rows:
                break
            yield from self._pass()
            yield None
        assert upcoming is None and not self.trees, "a tree that was let in can always finish"
        self._forget(len(self.prompts))

    def _start_waiting(self) -> None:
        """Give free rows to waiting paths, as far as there are pages, the earliest trees first."""
        for tree in self.trees.values():
            while tree.waiting and len(self.rows) < self.options.rows and self._start(tree, tree.waiting[0]):
                self.rows.append((tree, tree.waiting.pop(0)))

    def _start(self, tree: Tree, path: Path) -> bool:
        """Fork what a path goes on from, if there are pages."""
        parent = tree.prompt if path.parent is None else path.parent.sequence
        assert parent is not None, "a path that may be forked keeps its sequence"
        need = self._pages_from(tree, path)
        others = sum(other.promised for other in self.trees.values() if other is not tree)
        limit = (self.options.max_tree_pages or self.pool.num_pages) - tree.need.prompt
        if tree.held + need > limit or not self._has_room(others + need):
            return False
        # The last of the tokens that it was given is not in the cache yet: it is fed first.
        path.sequence = self.passes.fork(parent, len(tree.search.prompt_ids) + path.known - 1)
        self.pool.grow(path.sequence, len(tree.search.prompt_ids) - 1 + self.options.max_new_tokens)
        tree.held += need
        return True

    def _pages_from(self, tree: Tree, path: Path) -> int:
        """How many pages of its own a path has room in, from where it was forked to the longest it can get."""
        before = len(tree.search.prompt_ids) - 1
        return pages(before + self.options.max_new_tokens) - (before + path.known) // PAGE_SIZE

    def _admit(self, search: Search) -> Tree | None:
        """Let in a tree, if there are pages for all that it is promised; its prompt is computed by `_prefill`."""
        ids = np.array(search.prompt_ids[:-1], dtype=np.int64)
        need = Need.of(len(search.prompt_ids), self.options)
        reserve = need.path * (1 + need.capacity(self.pool.num_pages, self.options))
        promised = sum(tree.promised for tree in self.trees.values())
        if not self._has_room(promised + need.prompt + reserve):
            return None
        number, self.admitted = self.admitted, self.admitted + 1
        source, shared = self._longest_beginning(ids)
        if source is not None and source.length < shared:
            self._prefill()
        prompt = PagedSequence() if source is None else self.passes.fork(source, shared)
        self.pool.grow(prompt, len(ids))
        if shared < len(ids):
            self.prefills.append(Feed(prompt, ids[shared:].tolist(), number, shared // PAGE_SIZE * PAGE_SIZE))
        self.prompts[number] = (ids, prompt)
        self.trees[number] = Tree(number, search, need, reserve, prompt, search.start())
        self.report.prefilled_tokens += len(ids) - shared
        self.report.shared_prompt_tokens += shared
        return self.trees[number]

    def _prefill(self) -> None:
        """Compute the prompts of new trees, several in a pass."""
        feeds, self.prefills = self.prefills, []
        while feeds:
            number, size = 1, len(feeds[0].ids)
            while number < len(feeds) and size + len(feeds[number].ids) <= PREFILL_TOKENS:
                size, number = size + len(feeds[number].ids), number + 1
            self.passes.prefill(feeds[:number])
            feeds = feeds[number:]

    def _longest_beginning(self, ids: np.ndarray) -> tuple[PagedSequence | None, int]:
        """The remembered prompt that begins most like this one, and how many tokens they share."""
        best, shared = None, MIN_SHARED - 1
        for number, (others, _) in self.prompts.items():
            length = min(len(ids), len(others))
            different = np.flatnonzero(ids[:length] != others[:length])
            common = int(different[0]) if len(different) else length
            if common > shared:
                best, shared = number, common
        if best is None:
            return None, 0
        self.prompts.move_to_end(best)
        return self.prompts[best][1], shared

    def _has_room(self, number: int) -> bool:
        """Whether so many pages are free, once prompts of finished trees are forgotten as far as it helps."""
        while self.pool.num_free < number and self._forget(1):
            pass
        return self.pool.num_free >= number

    def _forget(self, number: int) -> bool:
        """Give back the least recently used prompts of finished trees, so many at most; whether there was one."""
        finished = [i for i in self.prompts if i not in self.trees][: max(0, number)]
        for i in finished:
            self.pool.release(self.prompts.pop(i)[1])
        return bool(finished)

    def _pass(self) -> Iterator[Search]:
        """One pass over all rows."""
        feeds = [self._feed(tree, path) for tree, path in self.rows]
        results = self.passes.predict(feeds)
        self.report.passes += 1
        for (tree, path), feed, written in zip(list(self.rows), feeds, results, strict=True):
            yield from self._take(tree, path, feed, written)

    def _take(self, tree: Tree, path: Path, feed: Feed, written: Written) -> Iterator[Search]:
        """Give a path what the model agrees to, start what follows from it, and yield its tree once that is done."""
        draft, before, agreed = feed.ids[1:], len(path.decoded.ids), 0
        while agreed < len(draft) and draft[agreed] == written.decoded.ids[agreed]:
            agreed += 1
        path.add(written, agreed + 1)
        if draft:
            assert path.draft is not None
            feed.sequence.cut(feed.sequence.length - len(draft) + agreed)
            path.draft.tell(len(draft), agreed)
        self.report.decoded_tokens += len(path.decoded.ids) - before
        self.report.verified_tokens += len(draft)
        self.report.accepted_tokens += agreed
        tree.waiting += [new for new in path.search.written(path, before) if new.finish is None]
        if path.finish is None:
            return
        self.rows.remove((tree, path))
        tree.waiting += [new for new in path.search.finished() if new.finish is None]
        if not path.search.holds(path):
            self._release(tree, path)
        if path.search.done:
            yield self._retire(tree)

    def _feed(self, tree: Tree, path: Path) -> Feed:
        assert path.sequence is not None, "a path in a row has a sequence"
        ids, draft = path.decoded.ids, list[int]()
        left = self.options.max_new_tokens - len(ids) - 1
        if path.draft is not None and left > 0:
            draft = path.draft.propose(ids[path.known - 1 :])[:left]
        last = ids[-1] if ids else tree.search.prompt_ids[-1]
        return Feed(path.sequence, [last, *draft], tree.number, tree.shared, draw_key(path.key, len(ids)))

    def _release(self, tree: Tree, path: Path) -> None:
        """Give back the pages of a path that is finished."""
        if path.sequence is not None:
            tree.held -= self._pages_from(tree, path)
            self.pool.release(path.sequence)
            path.sequence = None

    def _retire(self, tree: Tree) -> Search:
        """Give back all that a finished tree holds but its prompt."""
        for path in tree.search.paths:
            self._release(tree, path)
        assert tree.held == 0 and not tree.waiting
        del self.trees[tree.number]
        self._forget(len(self.prompts) - MAX_PROMPTS)
        return tree.search
