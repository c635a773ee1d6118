"""Passes of a Hugging Face model over paged sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from ttpa_kernels.paged_attention.op import PagedLayout, Segment, paged_attention, paged_layout, store_paged_

from ttpa.errors import InputError
from ttpa.model import head_weight
from ttpa.sampling.decoded import Decoded, Written
from ttpa.sampling.head import Picked, draw_key, pick
from ttpa.sampling.options import TOP, SamplingOptions
from ttpa.sampling.pool import PagedSequence, PagePool

PAGE_SIZE = 16


@dataclass(frozen=True)
class Feed:
    """Tokens of one path that go through the model: they follow what stands in the cache of `sequence`, whose first
    `shared` positions lie in the same pages for all feeds of one `group`. `key` is that of the draw behind the first
    of them, the others follow."""

    sequence: PagedSequence
    ids: Sequence[int]
    group: int
    shared: int
    key: int = 0

    def segment(self) -> Segment:
        """As the attention takes it."""
        return Segment(self.sequence.pages, self.sequence.length, len(self.ids), self.group, self.shared)


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of all layers `[layers, 2, G, S, D]`, and which slots a pass reads and writes."""

    kv_LAGSD: torch.Tensor
    layout: PagedLayout

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Store the new keys and values of a layer and attend to what each token sees; `[1, T, heads, D]`."""
        key_GSD, value_GSD = self.kv_LAGSD[layer]
        store_paged_(key_GSD, value_GSD, key, value, self.layout)
        return paged_attention(query, key_GSD, value_GSD, self.layout, scale=scale)


class Passes:
    """The pages of a run and the passes of the model over them.

    Every sequence is fed what it does not hold yet; the model's weights and its forward are those of transformers.
    """

    def __init__(self, model: PreTrainedModel, *, options: SamplingOptions, shape: CacheShape, num_pages: int) -> None:
        """Lay out `num_pages` pages for a model whose `cache_shape` is `shape`."""
        self.model, self.options = model, options
        self.pool = PagePool(num_pages=num_pages + 1, page_size=PAGE_SIZE)
        size = (shape.layers, 2, shape.heads, (num_pages + 1) * PAGE_SIZE, shape.width)
        self.kv_LAGSD = torch.empty(size, dtype=model.dtype, device=model.device)

    @torch.inference_mode()
    def fork(self, parent: PagedSequence, at: int) -> PagedSequence:
        """A sequence that goes on from position `at` of another one."""
        child, copy = self.pool.fork(parent, at)
        if copy is not None:
            source, target = (slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in copy)
            self.kv_LAGSD[:, :, :, target] = self.kv_LAGSD[:, :, :, source]
        return child

    @torch.inference_mode()
    def prefill(self, feeds: Sequence[Feed]) -> None:
        """Write the keys and values of the fed tokens; nothing is predicted."""
        self._hidden(feeds)
        for feed in feeds:
            feed.sequence.length += len(feed.ids)

    @torch.inference_mode()
    def predict(self, feeds: Sequence[Feed]) -> list[Written]:
        """The tokens that follow each fed token, as one `Written` a feed."""
        hidden_TH = self._hidden(feeds)
        keys = [draw_key(feed.key, i) for feed in feeds for i in range(len(feed.ids))]
        picked = choose(self.model, hidden_TH, torch.tensor(keys, device=hidden_TH.device), self.options)
        found = split(picked, [len(feed.ids) for feed in feeds])
        for feed in feeds:
            feed.sequence.length += len(feed.ids)
        return found

    def _hidden(self, feeds: Sequence[Feed]) -> torch.Tensor:
        device = self.model.device
        layout = paged_layout([feed.segment() for feed in feeds], page_size=PAGE_SIZE, device=device)
        ids = [token for feed in feeds for token in feed.ids]
        positions = [feed.sequence.length + i for feed in feeds for i in range(len(feed.ids))]
        id_T, position_T = torch.tensor([ids, positions], device=device)
        return hidden_states(self.model, id_T, position_T, PagedCache(self.kv_LAGSD, layout))


def hidden_states(model: PreTrainedModel, id_T: torch.Tensor, position_T: torch.Tensor, cache: Any) -> torch.Tensor:
    """The last hidden states `[T, H]` of tokens that see what `cache` lets them see."""
    output = model.get_decoder()(
        input_ids=id_T[None],
        position_ids=position_T[None],
        # transformers hands a mask of four dimensions down as it is and builds none of its own
        attention_mask=position_T[None, None, None],
        paged=cache,
        use_cache=False,
    )
    return output.last_hidden_state[0]


def choose(model: PreTrainedModel, hidden_TH: torch.Tensor, key_T: torch.Tensor, options: SamplingOptions) -> Picked:
    """The next token behind each hidden state."""
    weight_VH = head_weight(model)
    return pick(
        hidden_TH.to(weight_VH.dtype),
        weight_VH,
        num_top=TOP,
        temperature=options.draw_temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        key_B=key_T if options.draw_temperature else None,
    )


def split(picked: Picked, sizes: Sequence[int]) -> list[Written]:
    """Rows of a pass as one `Written` for each run of so many rows, copied to the host."""
    token, logp, entropy, varentropy, top_ids, top_p, complete = (value.cpu().numpy() for value in picked)
    found, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        start += size
        ids, logps, entropies, spreads = (values[rows].tolist() for values in (token, logp, entropy, varentropy))
        decoded = Decoded(ids, "length", logps, entropies, spreads, top_ids[rows], top_p[rows])
        found.append(Written(decoded, complete[rows]))
    return found


class CacheShape(NamedTuple):
    """What a model keeps of every token: so many layers of keys and values `[heads, width]`."""

    layers: int
    heads: int
    width: int

    def page_bytes(self, dtype: torch.dtype) -> int:
        """The size of one page."""
        return self.layers * 2 * self.heads * self.width * PAGE_SIZE * dtype.itemsize


@torch.inference_mode()
def cache_shape(model: PreTrainedModel) -> CacheShape:
    """What a model keeps of every token, found by running it on one token. Raises InputError for keys and values of
    different shapes, or layers that differ."""
    seen: list[tuple[torch.Size, torch.Size]] = []

    class Recorder:
        def attend(
            self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
        ) -> torch.Tensor:
            seen.append((key.shape, value.shape))
            return query.transpose(1, 2).new_zeros(1, 1, query.shape[1], value.shape[-1])

    zero_T = torch.zeros(1, dtype=torch.long, device=model.device)
    hidden_states(model, zero_T, zero_T, Recorder())
    shapes = {shape for pair in seen for shape in pair}
    if len(shapes) != 1:
        raise InputError(
            f"model type {model.config.model_type!r} cannot be sampled in pages: its layers keep keys and values of "
            f"different shapes {sorted(map(tuple, shapes))}; sample with vLLM instead",
            path=model.config.name_or_path or None,
        )
    (_, heads, _, width) = shapes.pop()
    return CacheShape(len(seen), heads, width)
