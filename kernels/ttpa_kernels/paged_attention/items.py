"""What the engine `triton` is to do: items, each some tokens that see the same keys, and a range of these keys.

An item holds up to `TILE` tokens of one group over shared keys, or of one segment. Long ranges are split, so that few
rows fill a GPU: a token then has several partial results, which are merged. Where the ranges end depends on the group
or segment alone, not on what else is in the pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ttpa_kernels.configs import PAGED_ATTENTION_SPLIT
from ttpa_kernels.paged_attention.layout import TILE, Segment, groups

FIELDS = 6
"""Of an item: its first place in the list of tokens and their number, the place of position 0 in the list of pages, the
first key and the one behind the last, and which partial result of its tokens it gives, -1 for the result itself."""


class Items(NamedTuple):
    """The work of a pass on the device, int32 but for the positions. I1 items of one token, I2 of several."""

    narrow_IF: torch.Tensor
    wide_IF: torch.Tensor
    most: int  # tokens of an item
    token: torch.Tensor  # of all items, one after the other
    page: torch.Tensor
    position_T: torch.Tensor  # int64
    partial_T: torch.Tensor  # the first partial result of a token
    parts_T: torch.Tensor  # how many it has: with 1 it is the result, with 0 the result is 0
    num_partials: int  # of all tokens
    merge: bool  # whether any token has not exactly 1


class Plan(NamedTuple):
    """The fields of `Items` that follow from the segments, on the host."""

    narrow_IF: np.ndarray
    wide_IF: np.ndarray
    token: np.ndarray
    parts_T: np.ndarray


def items(segments: Sequence[Segment], *, page_size: int, device: torch.device) -> Items:
    """The work of a pass over all segments."""
    pages = [np.asarray(segment.pages[: -(-segment.stop // page_size)]) for segment in segments]
    counts = np.array([segment.count for segment in segments])
    first_token = np.cumsum(counts) - counts
    first_page = np.cumsum([0, *map(len, pages)])
    found = plan(segments, first_token, first_page, [segment.stop for segment in segments], num_tokens=counts.sum())
    within = np.arange(counts.sum()) - np.repeat(first_token, counts)
    position_T = np.repeat([segment.start for segment in segments], counts) + within
    several_T = np.where(found.parts_T > 1, found.parts_T, 0)
    arrays = [found.narrow_IF, found.wide_IF, found.token, np.concatenate(pages)]
    arrays += [np.cumsum(several_T) - several_T, found.parts_T]
    sizes = [array.size for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]).astype(np.int32))
    narrow, wide, token, page, partial_T, parts_T = flat.to(device, non_blocking=True).split(sizes)
    return Items(
        narrow.view(-1, FIELDS),
        wide.view(-1, FIELDS),
        int(found.wide_IF[:, 1].max(initial=1)),
        token,
        page,
        torch.from_numpy(position_T.astype(np.int64)).to(device, non_blocking=True),
        partial_T,
        parts_T,
        int(several_T.sum()),
        bool((found.parts_T != 1).any()),
    )


def plan(
    segments: Sequence[Segment],
    first_token: Sequence[int] | np.ndarray,
    first_page: Sequence[int] | np.ndarray,
    reach: Sequence[int],
    *,
    num_tokens: int,
) -> Plan:
    """Items of segments whose tokens start at `first_token`, whose pages at `first_page` of the lists, and whose last
    token may see the positions below `reach`."""
    found: list[tuple[int, ...]] = []
    tokens: list[int] = []
    parts_T = np.zeros(num_tokens, dtype=np.int64)

    def add(chunk: Sequence[int], page: int, ranges: Sequence[tuple[int, int]]) -> None:
        for part, (first, stop) in enumerate(ranges, start=int(parts_T[chunk[0]])):
            found.append((len(tokens), len(chunk), page, first, stop, part))
        tokens.extend(chunk)
        parts_T[chunk] += len(ranges)

    for group in groups(segments):
        own = {i: range(first_token[i], first_token[i] + segments[i].count) for i in group}
        together = [i for i in group if segments[i].count <= TILE]
        shared = segments[group[0]].shared if len(together) > 1 else 0
        readers = [token for i in together for token in own[i]] if shared else []
        for chunk in _chunks(readers):
            add(chunk, first_page[group[0]], _ranges(0, shared, len(readers)))
        for i in group:
            first = shared if i in together else 0
            for chunk in _chunks(own[i]):
                stop = reach[i] - (own[i][-1] - chunk[-1])
                add(chunk, first_page[i], _ranges(first, stop, len(own[i])))
    table = np.array(found, dtype=np.int64).reshape(-1, FIELDS)
    token = np.array(tokens, dtype=np.int64)
    table[parts_T[token[table[:, 0]]] == 1, -1] = -1
    several = table[:, 1] > 1
    return Plan(table[~several], table[several], token, parts_T)


def _chunks(tokens: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(tokens), TILE):
        yield tokens[first : first + TILE]


def _ranges(first: int, stop: int, readers: int) -> list[tuple[int, int]]:
    """The positions `first ... stop - 1` in pieces, the longer the more tiles of tokens read them."""
    length = PAGED_ATTENTION_SPLIT * -(-readers // TILE)
    return [(at, min(at + length, stop)) for at in range(first, stop, length)]
