"""A layout of fixed shape, one token a row, whose content changes under a captured CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from ttpa_kernels.configs import PAGED_ATTENTION_SPLIT
from ttpa_kernels.engine import choose_engine
from ttpa_kernels.paged_attention.items import FIELDS, Items, plan
from ttpa_kernels.paged_attention.layout import PagedLayout, Segment, check_segments


class DecodeLayout:
    """Device buffers for passes of B rows with one new token each, for the engine 'triton'.

    `layout` reads from the buffers and never changes shape, so that a CUDA graph captured with it stays valid; `load`
    says what the rows are, and `advance_`, captured or not, moves every row at work on by one token. Rows without work
    store into page 0 and get an output of 0.
    """

    def __init__(self, *, rows: int, max_positions: int, page_size: int, device: torch.device | str) -> None:
        """Room for `rows` sequences of up to `max_positions` positions; no row is at work before the first `load`."""
        self.device = torch.device(device)
        engine = choose_engine(self.device, "triton")
        self.rows, self.page_size = rows, page_size
        self.num_pages = -(-max_positions // page_size)
        ranges = -(-self.num_pages * page_size // PAGED_ATTENTION_SPLIT)
        shapes = {
            "narrow": (rows * ranges, FIELDS),
            "wide": (rows // 2 * ranges, FIELDS),  # two rows to an item at least
            "token": (2 * rows,),  # in an item of its own, and in one of its group
            "page": (rows, self.num_pages + 1),  # behind the last page of a row page 0, for rows that overrun
            "parts": (rows,),
        }
        self.shapes = shapes
        self.tables = torch.zeros(sum(map(prod, shapes.values())), dtype=torch.int32, device=self.device)
        self.state = torch.zeros(3, rows, dtype=torch.int64, device=self.device)
        narrow_IF, wide_IF, token, self.page_BP, parts_B = self._views(self.tables)
        self.position_B, self.slot_B, self.step_B = self.state
        parts = ranges + 1  # what is shared and what is not can part within a range
        work = Items(
            narrow_IF=narrow_IF,
            wide_IF=wide_IF,
            most=rows,
            token=token,
            page=self.page_BP,
            position_T=self.position_B,
            partial_T=torch.arange(0, rows * parts, parts, dtype=torch.int32, device=self.device),
            parts_T=parts_B,
            num_partials=rows * parts,
            merge=True,
        )
        self.layout = PagedLayout(engine, page_size, rows, 0, self.slot_B, work)

    def load(self, segments: Sequence[Segment | None]) -> None:
        """Put a segment of one token, or None, into every row; its pages may reach further than it does yet.

        The copies to the device follow what the stream was given before, nothing waits for them, and `load` may be
        called again at once. Raises ValueError for segments that do not fit.
        """
        if len(segments) != self.rows:
            raise ValueError(f"there are {len(segments)} segments for {self.rows} rows: give None where a row is idle")
        busy = [row for row, segment in enumerate(segments) if segment is not None]
        found = [segment for segment in segments if segment is not None]
        if busy:
            check_segments(found, page_size=self.page_size)
        tables, state = self._staging(self.tables), self._staging(self.state)
        narrow_IF, wide_IF, token, page_BP, parts_B = (view.numpy() for view in self._views(tables))
        position_B, slot_B, step_B = state.numpy()
        reach = []
        for row, segment in zip(busy, found, strict=True):
            if segment.count != 1 or segment.start >= self.num_pages * self.page_size:
                raise ValueError(
                    f"row {row}: start is {segment.start} and count is {segment.count}: a row of a DecodeLayout has "
                    f"one new token, at a position below {self.num_pages * self.page_size}"
                )
            pages = segment.pages[: self.num_pages]
            page_BP[row, : len(pages)] = pages
            position_B[row], step_B[row] = segment.start, 1
            slot_B[row] = pages[segment.start // self.page_size] * self.page_size + segment.start % self.page_size
            reach.append(len(pages) * self.page_size)
        width = self.num_pages + 1
        work = plan(found, busy, [row * width for row in busy], reach, num_tokens=self.rows)
        narrow_IF[: len(work.narrow_IF)] = work.narrow_IF
        wide_IF[: len(work.wide_IF)] = work.wide_IF
        token[: len(work.token)] = work.token
        parts_B[:] = work.parts_T
        self.tables.copy_(tables, non_blocking=True)
        self.state.copy_(state, non_blocking=True)

    def advance_(self) -> None:
        """One token further in every row at work; behind its last page a row stores into page 0."""
        self.position_B += self.step_B
        page_B1 = (self.position_B // self.page_size).clamp_(max=self.num_pages)[:, None]
        first_B = self.page_BP.gather(1, page_B1)[:, 0].long() * self.page_size
        self.slot_B.copy_(first_B + self.position_B % self.page_size)

    def _views(self, tables: torch.Tensor) -> list[torch.Tensor]:
        parts = tables.split([prod(shape) for shape in self.shapes.values()])
        return [part.view(shape) for part, shape in zip(parts, self.shapes.values(), strict=True)]

    def _staging(self, like: torch.Tensor) -> torch.Tensor:
        """Zeros on the host; pinned memory is not handed out again while a copy from it is under way."""
        return torch.zeros(like.shape, dtype=like.dtype, pin_memory=self.device.type == "cuda")
