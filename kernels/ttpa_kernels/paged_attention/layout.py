"""What a pass over a paged cache feeds, as the host says it: segments of sequences, checked, and their slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ttpa_kernels.engine import Engine

TILE = 64
"""Tokens that read shared keys together at most; a segment of more tokens gains nothing from sharing."""


class Segment(NamedTuple):
    """`count` new tokens of a sequence, at positions `start ...`: token i sees the positions up to its own, start + i.

    Position p lies in slot `pages[p // page_size] page_size + p % page_size`. The first `shared` positions, whole pages
    at or before `start`, lie in the same pages for all segments of one `group` that say so.
    """

    pages: Sequence[int]
    start: int
    count: int  # type: ignore[assignment]  # it hides tuple.count
    group: int
    shared: int

    @property
    def stop(self) -> int:
        """How many positions the last token sees."""
        return self.start + self.count


@dataclass(frozen=True, eq=False)
class PagedLayout:
    """What an engine needs to know of a pass, made once for all layers by `paged_layout`."""

    engine: Engine
    page_size: int
    num_tokens: int
    num_slots: int  # a cache has at least so many
    slot_T: torch.Tensor  # where the new tokens are stored, int64
    pack: Any  # runs.Pack for 'torch', items.Items for 'triton'


def check_segments(segments: Sequence[Segment], *, page_size: int) -> None:
    """Raise ValueError for segments that cannot be, naming the first."""
    if page_size < 1:
        raise ValueError(f"page_size is {page_size}: give the slots of a page, 16 for one")
    if not segments:
        raise ValueError("there are no segments: a pass has at least one token")
    seen: dict[tuple[int, int], tuple[int, list[int]]] = {}
    for index, (pages, start, count, group, shared) in enumerate(segments):
        wrong = None
        if count < 1 or start < 0:
            wrong = f"start is {start} and count is {count}: start is at least 0 and count at least 1"
        elif len(pages) * page_size < start + count:
            wrong = f"{len(pages)} pages of {page_size} do not hold {start + count} positions: give it more pages"
        elif shared % page_size or not 0 <= shared <= start:
            wrong = f"shared is {shared}: give a multiple of {page_size}, the page size, from 0 to {start}, the start"
        elif shared:
            prefix = list(pages[: shared // page_size])
            first, expected = seen.setdefault((group, shared), (index, prefix))
            if prefix != expected:
                wrong = f"its {shared} shared positions lie in other pages than those of segment {first}, of its group"
        if wrong:
            raise ValueError(f"segment {index}: {wrong}")


def slots(segment: Segment, first: int, stop: int, *, page_size: int) -> np.ndarray:
    """The slots of positions `first ... stop - 1`."""
    pages = np.asarray(segment.pages[first // page_size : -(-stop // page_size)], dtype=np.int64)
    whole = pages[:, None] * page_size + np.arange(page_size)
    offset = first // page_size * page_size
    return whole.reshape(-1)[first - offset : stop - offset]


def groups(segments: Sequence[Segment]) -> list[list[int]]:
    """Indexes of the segments that read shared keys together, in order of the first of each group."""
    found: dict[tuple[int, int], list[int]] = {}
    for index, segment in enumerate(segments):
        key = (segment.group, segment.shared) if segment.shared else (index, 0)
        found.setdefault(key, []).append(index)
    return list(found.values())
