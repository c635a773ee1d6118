"""Decoding on a GPU: a step of all rows is one CUDA graph, and the host looks at a step while the next one runs.

A graph holds the body, the attention over pages, the head, the choice of the token and its way back into the next step.
Being a step behind costs the host nothing: a fork is legal at any past position, and a path that ends has written one
token more, which nobody reads. Branches with a draft are fed many tokens at once, outside of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ttpa_kernels.paged_attention.op import DecodeLayout

from ttpa.sampling.decoded import Decoded, Written
from ttpa.sampling.engine import Engine, Tree
from ttpa.sampling.head import Picked, draw_key
from ttpa.sampling.options import SamplingOptions
from ttpa.sampling.passes import PAGE_SIZE, Feed, PagedCache, Passes, choose, hidden_states
from ttpa.sampling.report import SamplingReport
from ttpa.sampling.search import Path, Search

WARM_UP = 3
"""Steps before the capture, in which kernels are compiled and libraries take their workspaces."""

DRAFT_SHARE = 4
"""Drafts are verified once a quarter of the rows wait with one, so that one pass serves many of them."""


class DecodeStep:
    """One new token in every row: a CUDA graph on a GPU, and the same calls one by one on a CPU."""

    def __init__(self, passes: Passes, *, rows: int, max_positions: int) -> None:
        """Prepare a step over the pages of `passes`, for sequences of up to `max_positions` positions."""
        self.passes, device = passes, passes.model.device
        self.layout = DecodeLayout(rows=rows, max_positions=max_positions, page_size=PAGE_SIZE, device=device)
        self.cache = PagedCache(passes.kv_LAGSD, self.layout.layout)
        self.id_B, self.key_B = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        with torch.inference_mode():
            self.result_BX = self._step()  # rows are idle: what they write goes to page 0
            if device.type == "cuda":
                side = torch.cuda.Stream(device)
                side.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(side):
                    for _ in range(WARM_UP):
                        self._step()
                torch.cuda.current_stream(device).wait_stream(side)
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.result_BX = self._step()

    @torch.inference_mode()
    def load(self, feeds: Sequence[Feed | None], fresh: Sequence[int]) -> None:
        """Say what the rows are. The `fresh` ones begin with the id of their feed, the others go on with the token that
        the step before has written or is writing now."""
        device = self.id_B.device
        self.layout.load([None if feed is None else feed.segment() for feed in feeds])
        self.key_B.copy_(self._host([0 if feed is None else feed.key for feed in feeds]), non_blocking=True)
        if fresh:
            rows = self._host(list(fresh)).to(device, non_blocking=True)
            ids = self._host([feeds[row].ids[0] for row in fresh])  # type: ignore[union-attr]
            self.id_B.index_copy_(0, rows, ids.to(device, non_blocking=True))

    @torch.inference_mode()
    def launch(self) -> Ticket:
        """Run a step and send what it writes to the host, without waiting for either."""
        if self.graph is None:
            self.result_BX.copy_(self._step())
            return Ticket(self.result_BX.clone(), None)
        self.graph.replay()
        host_BX = torch.empty(self.result_BX.shape, dtype=torch.int32, pin_memory=True)
        host_BX.copy_(self.result_BX, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Ticket(host_BX, event)

    def _step(self) -> torch.Tensor:
        hidden_BH = hidden_states(self.passes.model, self.id_B, self.layout.position_B, self.cache)
        picked = choose(self.passes.model, hidden_BH, self.key_B, self.passes.options)
        self.id_B.copy_(picked.token_B)
        self.key_B.copy_(draw_key(self.key_B, torch.ones_like(self.key_B)))
        self.layout.advance_()
        return packed(picked)

    def _host(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, pin_memory=self.id_B.device.type == "cuda")


def packed(picked: Picked) -> torch.Tensor:
    """All fields side by side as int32 [B, X], so that one copy takes them to the host; floats keep their bits."""
    ids = [picked.token_B[:, None], picked.complete_B[:, None], picked.top_id_BK]
    floats = [picked.logp_B[:, None], picked.entropy_B[:, None], picked.varentropy_B[:, None], picked.top_p_BK]
    return torch.cat([x.to(torch.int32) for x in ids] + [x.float().view(torch.int32) for x in floats], dim=1)


@dataclass(frozen=True)
class Ticket:
    """What a step wrote, on its way to the host."""

    host_BX: torch.Tensor
    event: torch.cuda.Event | None

    def rows(self) -> list[Written]:
        """The token of each row, once the copy has arrived."""
        if self.event is not None:
            self.event.synchronize()
        host_BX = self.host_BX.numpy()
        K = (host_BX.shape[1] - 5) // 2
        numbers = np.split(host_BX[:, : 2 + K].astype(np.int64), [1, 2], axis=1)
        logp, entropy, varentropy, top_p = np.split(host_BX[:, 2 + K :].view(np.float32), [1, 2, 3], axis=1)
        token, complete, top_id = numbers
        columns = (x[:, 0].tolist() for x in (token, logp, entropy, varentropy))
        return [
            Written(Decoded([t], "length", [a], [b], [c], top_id[i : i + 1], top_p[i : i + 1]), complete[i] != 0)
            for i, (t, a, b, c) in enumerate(zip(*columns, strict=True))
        ]


class GraphEngine(Engine):
    """The engine with decode steps that the host is one behind of."""

    def __init__(self, passes: Passes, *, options: SamplingOptions, report: SamplingReport, step: DecodeStep) -> None:
        """`step` is one of the same passes, with as many rows as the options say."""
        super().__init__(passes, options=options, report=report)
        self.step = step
        self.places: list[tuple[Tree, Path] | None] = [None] * options.rows  # of the step
        self.under_way: list[tuple[Ticket, list[tuple[Tree, Path, Feed] | None]]] = []

    def _pass(self) -> Iterator[Search]:
        """Launch a step, verify drafts where enough wait for it, and look at the step before."""
        drafts = self._place_rows()
        launched = any(self.places)
        if launched:
            self._launch()
        if drafts and (not launched or DRAFT_SHARE * len(drafts) >= self.options.rows):
            feeds = [feed for _, _, feed in drafts]
            self.report.passes += 1
            for (tree, path, feed), written in zip(drafts, self.passes.predict(feeds), strict=True):
                yield from self._take(tree, path, feed, written)
        if len(self.under_way) > launched:
            ticket, rows = self.under_way.pop(0)
            for row, written in zip(rows, ticket.rows(), strict=True):
                if row is not None and row[1].finish is None:
                    yield from self._take(*row, written)

    def _place_rows(self) -> list[tuple[Tree, Path, Feed]]:
        """Bring the places of the step in line with the rows; what is returned has a draft, and no place."""
        old = self.places
        self.places = [None if place is None or place[1].finish is not None else place for place in old]
        placed = {id(place[1]) for place in self.places if place is not None}
        drafts, fresh = [], []
        for tree, path in self.rows:
            if id(path) in placed:
                continue
            feed = self._feed(tree, path)
            if len(feed.ids) > 1:
                drafts.append((tree, path, feed))
                continue
            path.draft = None  # a row of the step runs ahead of the host and so cannot wait for another draft
            fresh.append(self.places.index(None))
            self.places[fresh[-1]] = (tree, path)
        if self.places != old:
            self.step.load([self._next(place) for place in self.places], fresh)
        return drafts

    def _next(self, place: tuple[Tree, Path] | None) -> Feed | None:
        """What a row of the step is fed, None where there is nothing left to write; of a row that is under way already
        the step itself knows the token."""
        if place is None:
            return None
        tree, path = place
        assert path.sequence is not None
        position = path.sequence.length - (len(tree.search.prompt_ids) - 1)  # of the completion, the one to be written
        if position >= self.options.max_new_tokens:
            return None
        ids = [*tree.search.prompt_ids[-1:], *path.decoded.ids]
        return Feed(path.sequence, ids[position:] or [0], tree.number, tree.shared, draw_key(path.key, position))

    def _launch(self) -> None:
        rows: list[tuple[Tree, Path, Feed] | None] = []
        for place in self.places:
            feed = self._next(place)
            rows.append(None if place is None or feed is None else (*place, feed))
        self.under_way.append((self.step.launch(), rows))
        self.report.passes += 1
        for row in rows:
            if row is not None:
                row[2].sequence.length += 1
