"""The state of one tree while it is sampled: its paths, and which forks are taken."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ttpa.sampling.decoded import Decoded, Written
from ttpa.sampling.draft import Draft
from ttpa.sampling.forks import Place, fork_places, is_candidate, token_fields
from ttpa.sampling.head import path_key
from ttpa.sampling.options import SamplingOptions
from ttpa.sampling.pool import PagedSequence
from ttpa.sampling.stop import Stop

NEVER = 2**62


@dataclass(eq=False)
class Path:
    """One answer that is being written: the trunk, a branch, or an independent sample. The first `known` tokens of
    `decoded` were given to it (those of its parent before the fork, and the token it forks with); `key` is that of
    its draws, of which the first that was not complete was that of position `incomplete_from`. `finish` is set once it
    is done."""

    search: Search
    name: str
    key: int
    decoded: Decoded
    known: int = 0
    parent: Path | None = None
    draft: Draft | None = None
    sequence: PagedSequence | None = None
    finish: str | None = None
    incomplete_from: int = NEVER

    @property
    def depth(self) -> int:
        """How many forks lie between it and the prompt."""
        return self.name.count("/")

    def add(self, written: Written, number: int) -> None:
        """Append the first `number` tokens, as far as the answer goes on."""
        own, before, new = self.decoded, len(self.decoded.ids), written.decoded
        own.ids += new.ids[:number]
        limit = self.search.options.max_new_tokens
        end = self.search.stop.at(own.ids, before)
        if end is not None and end <= limit:
            self.finish = own.finish = "stop"
        elif len(own.ids) >= limit:
            end, self.finish = limit, "length"
        number = (len(own.ids) if end is None else end) - before
        del own.ids[before + number :]
        own.logps += new.logps[:number]
        own.entropy += new.entropy[:number]
        own.varentropy += new.varentropy[:number]
        ids, probabilities = new.top_ids[:number], new.top_probabilities[:number]
        own.top_ids = np.concatenate([own.top_ids, ids]) if before else ids
        own.top_probabilities = np.concatenate([own.top_probabilities, probabilities]) if before else probabilities
        for i in np.flatnonzero(~written.complete[:number])[:1].tolist():
            own.complete, self.incomplete_from = False, min(self.incomplete_from, before + i)


@dataclass(eq=False)
class Search:
    """One tree: `levels` of paths, `forked` places, and in `dropped` the forks that are not taken, by reason.
    `capacity` is how many branches there are pages for if all of them stay in the cache.

    Under mode tps the branches come level by level: a level begins once all paths of the one before are finished, and
    goes through them in order, through the places of each by score (under fork_order first by position), through the
    alternatives of each by probability, while there are leaves, tokens and pages. So the tree is a function of the
    decision, whatever is decoded beside it. With fork_order first the trunk is forked while it is written, which
    changes when a branch is decoded and nothing else.
    """

    id: str
    prompt_ids: list[int]
    tools: Sequence[dict[str, Any]]
    tokenizer: Any
    options: SamplingOptions
    stop: Stop
    capacity: int
    levels: list[list[Path]] = field(default_factory=list)
    forked: list[tuple[Path, int]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    live: list[Place] = field(default_factory=list)  # where the trunk was forked while it was written

    @property
    def paths(self) -> list[Path]:
        """All paths in the order in which they were given a leaf."""
        return [path for level in self.levels for path in level]

    @property
    def done(self) -> bool:
        """Whether every path that has begun is finished; after `finished` there will be no more."""
        return all(path.finish is not None for path in self.paths)

    @property
    def forks(self) -> Counter[str]:
        """The number of places that were forked by the field class that they have in the finished path."""
        fields = {path: token_fields(self.tokenizer, path.decoded.ids, self.tools) for path, _ in self.forked}
        return Counter(fields[path][at] or "other" for path, at in self.forked)

    def start(self) -> list[Path]:
        """The first paths: the trunk, or all samples."""
        if self.options.mode == "release":
            names = [f"sample {i}" for i in range(self.options.num_samples)]
        else:
            names = ["trunk"]
        self.levels = [[self._path(name, _nothing()) for name in names], *([[]] if self._forks_live else [])]
        return list(self.levels[0])

    def written(self, path: Path, first: int) -> list[Path]:
        """The branches that begin now that the trunk has new tokens, from position `first` on."""
        if path.name != "trunk" or not self._forks_live:
            return []
        new = []
        for at in range(first, len(path.decoded.ids)):
            far = all(at - place.at >= self.options.min_distance for place in self.live)
            if far and len(self.live) < self.options.num_forks:
                alternatives = is_candidate(path.decoded, at, options=self.options)
                inside = self._field(path, at) if alternatives else None  # last, as it takes longer than all the rest
                if inside is not None:
                    self.live.append(Place(at, inside, 0.0, alternatives))
                    new += self._branches(path, self.live[-1], self.levels[1])
        return new

    def finished(self) -> list[Path]:
        """The branches that begin now that one more path is finished."""
        new: list[Path] = []
        if self.options.mode == "release":
            return new
        while self.done and len(self.levels) <= self.options.max_depth:
            level: list[Path] = []
            for path in self.levels[-1]:
                places = fork_places(path.decoded, self._fields(path), options=self.options, first=path.known)
                if self.options.fork_order == "best":
                    places.sort(key=lambda place: -place.score)
                for place in places:
                    self._branches(path, place, level)
            self.levels.append(level)
            new += level
            if not level:
                break
        return new

    def holds(self, path: Path) -> bool:
        """Whether a finished path may be forked yet, so that what it wrote has to stay in the cache."""
        return self.options.mode == "tps" and path.depth < self.options.max_depth

    @property
    def _forks_live(self) -> bool:
        # What a level may promise depends on what the trunk really used, so a budget of tokens has to wait for its end.
        options = self.options
        return options.mode == "tps" and options.fork_order == "first" and options.max_tree_tokens is None

    def _fields(self, path: Path) -> list[str | None]:
        """The field class of each token at which a path may be forked."""
        ids, options = path.decoded.ids, self.options
        if options.fork_order == "best":
            return token_fields(self.tokenizer, ids, self.tools)
        asked = [bool(is_candidate(path.decoded, at, options=options)) for at in range(len(ids))]
        return [self._field(path, at) if candidate else None for at, candidate in enumerate(asked)]

    def _field(self, path: Path, at: int) -> str | None:
        """The field class of a token as far as it can be told from what stands before it and itself."""
        return token_fields(self.tokenizer, path.decoded.ids[: at + 1], self.tools)[at]

    def _branches(self, path: Path, place: Place, level: list[Path]) -> list[Path]:
        """The branches at one place, as far as there is room for them; they join the level."""
        options, own, at = self.options, path.decoded, place.at
        new: list[Path] = []
        for token, probability in place.alternatives:
            reason = self._refusal(at, level)
            if reason is not None:
                self.dropped[reason] += 1
                continue
            decoded = Decoded(
                [*own.ids[:at], token],
                "length",
                [*own.logps[:at], math.log(probability)],
                own.entropy[: at + 1],
                own.varentropy[: at + 1],
                own.top_ids[: at + 1],
                own.top_probabilities[: at + 1],
                path.incomplete_from >= at,
            )
            new.append(self._path(f"{path.name}/{at}:{token}", decoded, parent=path))
            new[-1].incomplete_from = path.incomplete_from if path.incomplete_from < at else NEVER
            if options.draft:
                new[-1].draft = Draft(own.ids, at=at, token=token)
            level.append(new[-1])
        if new:
            self.forked.append((path, at))
        return new

    def _refusal(self, at: int, level: list[Path]) -> str | None:
        """Why one more branch of a level, forked at `at`, cannot be had."""
        options, before = self.options, [path for path in self.paths if path not in level]
        if len(before) + len(level) >= options.max_leaves:
            return "leaves"
        if options.max_tree_tokens is not None:
            used = sum(len(path.decoded.ids) - path.known for path in before)
            promised = sum(options.max_new_tokens - path.known for path in level)
            if used + promised + options.max_new_tokens - at - 1 > options.max_tree_tokens:
                return "tokens"
        if options.max_depth > 1 and len(before) + len(level) > self.capacity:
            return "pages"
        return None

    def _path(self, name: str, decoded: Decoded, *, parent: Path | None = None) -> Path:
        known = len(decoded.ids)
        path = Path(self, name, path_key(self.options.seed, self.id, name), decoded, known=known, parent=parent)
        end = self.stop.at(decoded.ids, known - 1) if known else None
        if end is not None:
            path.finish = decoded.finish = "stop"
        elif known >= self.options.max_new_tokens:
            path.finish = "length"
        return path


def _nothing() -> Decoded:
    """An answer of which nothing is written."""
    return Decoded([], "length", [], [], [], np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32))
