"""The engine `torch`: keys that several tokens share are read where they stand, the rest is gathered.

Pages that follow each other in the cache form a run, which is a view `[G, slots, D]`. The scores of all tokens of a
group against a run are one product, those against what each segment holds beyond its shared positions another one, over
gathered keys; both stand in one matrix, so that there is one softmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from ttpa_kernels.numerics import wide
from ttpa_kernels.paged_attention.layout import TILE, Segment, groups, slots

PAIRS = 1 << 17  # scores of one head that are held at once: 16 MiB at 32 heads in fp32
BIAS = 1 << 22  # numbers of a mask that is held for all layers: 16 MiB in fp32
RUNS = 8  # more runs than this are gathered
GATHERED = 256  # positions of a segment that are gathered without asking whether they stand in runs


class Run(NamedTuple):
    """Keys that all tokens of one group see: tokens and columns of the scores of their batch, slots of the cache."""

    tokens: slice
    columns: slice
    keys: slice | torch.Tensor


class Together(NamedTuple):
    """A batch of short segments: T of its tokens, U segments of up to C tokens and W positions of their own."""

    tokens: slice
    runs: tuple[Run, ...]
    unseen: tuple[tuple[slice, slice], ...]  # tokens and columns of runs of others
    num_shared: int  # columns of the runs
    slot_UW: torch.Tensor
    pad_UC: torch.Tensor | None  # the token at each place of a segment; None where every segment is one token
    place_T: torch.Tensor | None  # and the place of each token
    bias_T1W: torch.Tensor  # 0 where a token sees a position of its segment, -inf elsewhere


class Alone(NamedTuple):
    """Tokens of one long segment, and all keys that they see; `bias_TS` is None where both are the whole segment."""

    tokens: slice
    keys: slice | torch.Tensor
    bias_TS: torch.Tensor | None


class Pack(NamedTuple):
    """The parts of a pass, over its tokens in the order `order_T`, that `restore_T` takes back; None: as they are."""

    parts: tuple[Together | Alone, ...]
    order_T: torch.Tensor | None
    restore_T: torch.Tensor | None


def pack(segments: Sequence[Segment], *, page_size: int, device: torch.device) -> Pack:
    """Cut a pass into batches of short segments, group by group, and long segments by themselves."""
    counts = [segment.count for segment in segments]
    first = np.cumsum([0, *counts])
    together: list[list[int]] = [[]]
    alone = [i for i, segment in enumerate(segments) if _stands_alone(segment, len(segments))]
    short = [i for i, segment in enumerate(segments) if not _stands_alone(segment, len(segments))]
    num_tokens = widest = 0
    for index in (short[i] for group in groups([segments[i] for i in short]) for i in group):
        segment = segments[index]
        num_tokens, widest = num_tokens + segment.count, max(widest, segment.stop)
        if together[-1] and num_tokens * widest > PAIRS:
            together.append([])
            num_tokens, widest = segment.count, segment.stop
        together[-1].append(index)
    parts: list[Together | Alone] = []
    at = 0
    for batch in filter(None, together):
        parts.append(_together([segments[i] for i in batch], at, page_size, device))
        at += sum(counts[i] for i in batch)
    for i in alone:
        parts += _alone(segments[i], at, page_size, device)
        at += counts[i]
    sequence = [i for batch in together for i in batch] + alone
    if sequence == sorted(sequence):
        return Pack(tuple(parts), None, None)
    order = np.concatenate([np.arange(first[i], first[i + 1]) for i in sequence])
    return Pack(tuple(parts), _tensor(order, device), _tensor(np.argsort(order), device))


def _stands_alone(segment: Segment, number: int) -> bool:
    return segment.count > TILE or (number == 1 and segment.start == 0)


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _together(batch: list[Segment], at: int, page_size: int, device: torch.device) -> Together:
    members = [[batch[i] for i in group] for group in groups(batch)]
    shared = [_shared(group, page_size) for group in members]
    num_shared, token = max(shared), 0
    runs: list[Run] = []
    unseen: list[tuple[slice, slice]] = []
    own_first: list[int] = []
    for group, stop in zip(members, shared, strict=True):
        tokens = slice(token, token + sum(segment.count for segment in group))
        token, column = tokens.stop, 0
        for keys in _keys(group[0], stop, page_size, device):
            length = keys.stop - keys.start if isinstance(keys, slice) else len(keys)
            runs.append(Run(tokens, slice(column, column + length), keys))
            column += length
        if stop < num_shared:
            unseen.append((tokens, slice(stop, num_shared)))
        own_first += [stop] * len(group)
    counts = np.array([segment.count for segment in batch])
    held_U = np.array([segment.stop for segment in batch]) - own_first
    width = int(held_U.max())
    own = [
        list(s.pages[first // page_size : -(-s.stop // page_size)]) for s, first in zip(batch, own_first, strict=True)
    ]
    most = max(map(len, own))
    page_UP = np.array([pages + pages[-1:] * (most - len(pages)) for pages in own])
    # behind the last position any slot that has been written: its probability is 0
    position_UW = np.minimum(np.arange(width), held_U[:, None] - 1)
    slot_UW = np.take_along_axis(page_UP, position_UW // page_size, axis=1) * page_size + position_UW % page_size
    within = np.concatenate([np.arange(count) for count in counts])
    last_T = np.repeat([segment.start for segment in batch], counts) + within - np.repeat(own_first, counts)
    bias_TW = np.where(np.arange(width) <= last_T[:, None], 0.0, -np.inf).astype(np.float32)
    pad_UC = place_T = None
    if counts.max() > 1:
        starts, places = np.cumsum(counts) - counts, int(counts.max())
        pad_UC = _tensor((starts[:, None] + np.minimum(np.arange(places), counts[:, None] - 1)).reshape(-1), device)
        place_T = _tensor(np.repeat(np.arange(len(batch)) * places, counts) + within, device)
    return Together(
        slice(at, at + token),
        tuple(runs),
        tuple(unseen),
        num_shared,
        _tensor(slot_UW, device),
        pad_UC,
        place_T,
        _tensor(bias_TW, device)[:, None],
    )


def _shared(group: list[Segment], page_size: int) -> int:
    """Positions that all segments of a group have in common; what stands before a single one, if that is much."""
    if len(group) == 1 and group[0].start - group[0].shared > GATHERED:
        return group[0].start // page_size * page_size
    return group[0].shared


def _keys(segment: Segment, stop: int, page_size: int, device: torch.device) -> list[slice | torch.Tensor]:
    """Where the first `stop` positions of a sequence lie: few runs, or the slots themselves."""
    if not stop:
        return []
    pages = np.asarray(segment.pages[: -(-stop // page_size)], dtype=np.int64)
    first = [0, *(1 + np.flatnonzero(pages[1:] != pages[:-1] + 1)).tolist()]  # of each run
    if len(first) > RUNS:
        return [_tensor(slots(segment, 0, stop, page_size=page_size), device)]
    found: list[slice | torch.Tensor] = []
    for begin, end in zip(first, [*first[1:], len(pages)], strict=True):
        length = min(end * page_size, stop) - begin * page_size
        found.append(slice(int(pages[begin] * page_size), int(pages[begin] * page_size + length)))
    return found


def _alone(segment: Segment, at: int, page_size: int, device: torch.device) -> Iterator[Alone]:
    if segment.start == 0:
        yield Alone(slice(at, at + segment.count), _one(segment, segment.stop, page_size, device), None)
        return
    step = max(1, BIAS // segment.stop)
    for begin in range(0, segment.count, step):
        end = min(begin + step, segment.count)
        last_T = segment.start + torch.arange(begin, end, device=device)
        seen = segment.start + end
        bias_TS = torch.zeros(end - begin, seen, device=device)
        bias_TS.masked_fill_(torch.arange(seen, device=device) > last_T[:, None], -torch.inf)
        yield Alone(slice(at + begin, at + end), _one(segment, seen, page_size, device), bias_TS)


def _one(segment: Segment, stop: int, page_size: int, device: torch.device) -> slice | torch.Tensor:
    """The first `stop` positions as one run, or their slots."""
    found = _keys(segment, stop, page_size, device)
    return found[0] if len(found) == 1 else _tensor(slots(segment, 0, stop, page_size=page_size), device)


def attention(
    query: torch.Tensor, key_GSD: torch.Tensor, value_GSD: torch.Tensor, pack: Pack, scale: float
) -> torch.Tensor:
    """`paged_attention` part by part."""
    if pack.order_T is not None:
        query = query.index_select(2, pack.order_T)
    found = []
    for part in pack.parts:
        q = query[:, :, part.tokens]
        if isinstance(part, Together):
            found.append(_attend_together(q, key_GSD, value_GSD, part, scale))
        else:
            found.append(_attend_alone(q, key_GSD, value_GSD, part, scale))
    out = found[0] if len(found) == 1 else torch.cat(found, dim=1)
    return out if pack.restore_T is None else out.index_select(1, pack.restore_T)


def _read(cache_GSD: torch.Tensor, keys: slice | torch.Tensor) -> torch.Tensor:
    return cache_GSD[:, keys] if isinstance(keys, slice) else cache_GSD.index_select(1, keys)


def _attend_alone(
    query: torch.Tensor, key_GSD: torch.Tensor, value_GSD: torch.Tensor, part: Alone, scale: float
) -> torch.Tensor:
    key, value = (_read(cache, part.keys)[None] for cache in (key_GSD, value_GSD))
    # off the CPU the kernels that take a mask want as many key heads as query heads
    grouped = query.device.type == "cpu"
    if not grouped:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    bias = None if part.bias_TS is None else part.bias_TS.to(query.dtype)
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous()


def _attend_together(
    query: torch.Tensor, key_GSD: torch.Tensor, value_GSD: torch.Tensor, part: Together, scale: float
) -> torch.Tensor:
    (_, N, T, D), G, dtype = query.shape, len(key_GSD), wide(query.dtype)
    n, U, W = N // G, *part.slot_UW.shape
    q_GTnD = (query[0].unflatten(0, (G, n)).transpose(1, 2).to(dtype) * scale).contiguous()
    score_GTnS = q_GTnD.new_empty(G, T, n, part.num_shared + W)
    q_GRD, score_GRS = q_GTnD.flatten(1, 2), score_GTnS.flatten(1, 2)
    for tokens, columns, keys in part.runs:
        rows = slice(tokens.start * n, tokens.stop * n)
        torch.bmm(q_GRD[:, rows], _read(key_GSD, keys).to(dtype).mT, out=score_GRS[:, rows, columns])
    for tokens, columns in part.unseen:
        score_GTnS[:, tokens, :, columns] = -torch.inf
    key_GUWD, value_GUWD = (
        x.index_select(1, part.slot_UW.view(-1)).to(dtype).unflatten(1, (U, W)) for x in (key_GSD, value_GSD)
    )
    if part.pad_UC is not None:
        q_GTnD = q_GTnD.index_select(1, part.pad_UC)
    own_GTnW = (q_GTnD.view(G, U, -1, D) @ key_GUWD.mT).view(G, -1, n, W)
    if part.place_T is not None:
        own_GTnW = own_GTnW.index_select(1, part.place_T)
    torch.add(own_GTnW, part.bias_T1W, out=score_GTnS[..., part.num_shared :])
    p_GTnS = score_GTnS.softmax(dim=-1)
    p_GTnW = p_GTnS[..., part.num_shared :]
    if part.pad_UC is not None:
        p_GTnW = p_GTnW.index_select(1, part.pad_UC)
    out_GTnD = (p_GTnW.reshape(G, U, -1, W) @ value_GUWD).view(G, -1, n, D)
    if part.place_T is not None:
        out_GTnD = out_GTnD.index_select(1, part.place_T)
    p_GRS, out_GRD = p_GTnS.flatten(1, 2), out_GTnD.flatten(1, 2)
    for tokens, columns, keys in part.runs:
        rows = slice(tokens.start * n, tokens.stop * n)
        out_GRD[:, rows].baddbmm_(p_GRS[:, rows, columns], _read(value_GSD, keys).to(dtype))
    return out_GTnD.transpose(0, 1).reshape(1, T, N, D).to(query.dtype)
