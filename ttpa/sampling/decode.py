"""Batched decoding with exact statistics of every token, and branches that reuse the cache of what they fork from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

TOP = 20
"""How many of the most likely tokens are kept at each position of a trunk."""

ROOM = 64  # slots that a cache is extended by at once
FULL = 0.75  # finished rows leave a batch as soon as not more than this share of it is alive


@dataclass(frozen=True)
class Decoded:
    """What was decoded in one row, the end-of-turn token included, and how: `finish` is stop or length, `logps [n]`
    and `entropy [n]` are in nats, `top_ids [n, K]` and `top_probabilities [n, K]` the most likely tokens in order."""

    ids: list[int]
    finish: str
    logps: list[float]
    entropy: list[float]
    top_ids: np.ndarray
    top_probabilities: np.ndarray


@dataclass(frozen=True)
class Fork:
    """A token in the place of token `at` of the completion in row `row` of a decoded batch."""

    row: int
    at: int
    token: int


def end_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The token ids that end a turn: those of the model's generation config and config, and the tokenizer's."""
    found: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return sorted(found)


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Sequence[int],
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seeds: Sequence[int] | None = None,
) -> list[Decoded]:
    """Decode every prompt until one of `ends` or for `max_new_tokens` tokens, greedily or, with one seed per prompt,
    by drawing at temperature 1. The answers stand in the order of the prompts, without the most likely tokens (K = 0);
    which prompts share a batch changes them by float rounding only."""
    found: dict[int, Decoded] = {}
    for rows in batches([len(prompt) for prompt in prompts], batch_size):
        start = _Start.of_prompts(model, [prompts[i] for i in rows], max_new_tokens)
        uniform_BN = None
        if seeds is not None:
            draws = [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seeds[i])) for i in rows]
            uniform_BN = torch.stack(draws).to(model.device)
        found.update(zip(rows, _run(model, start, ends=ends, uniform_BN=uniform_BN), strict=True))
    return [found[i] for i in range(len(prompts))]


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indexes of rows, at most `batch_size` at a time, rows of like length together, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


class Trunks:
    """Greedy answers to one batch of prompts, with the cache that their branches start from."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, ends: Sequence[int], max_new_tokens: int
    ) -> None:
        """Decode the prompts together; `decoded` holds one answer per prompt, with the `TOP` most likely tokens."""
        self.model, self.ends, self.max_new_tokens = model, list(ends), max_new_tokens
        self.lengths = [len(prompt) for prompt in prompts]
        self.kept = _Kept()
        start = _Start.of_prompts(model, prompts, max_new_tokens)
        self.decoded = _run(model, start, ends=ends, top=TOP, kept=self.kept)

    def branch(self, forks: Sequence[Fork], *, batch_size: int) -> list[Decoded]:
        """For each fork what follows its token, decoded greedily until an end or `max_new_tokens` tokens of the whole
        completion; empty where the token itself ends it. Branches of all rows and positions share batches."""
        found: dict[int, Decoded] = {}
        going = []
        for i, fork in enumerate(forks):
            if fork.token in self.ends or fork.at + 1 >= self.max_new_tokens:
                nothing = np.zeros((0, 0))
                finish = "stop" if fork.token in self.ends else "length"
                found[i] = Decoded([], finish, [], [], nothing.astype(np.int64), nothing)
            else:
                going.append(i)
        # What the trunk still wrote behind the fork is the best guess of how long the branch will run.
        left = [len(self.decoded[forks[i].row].ids) - forks[i].at for i in going]
        for rows in batches(left, batch_size):
            chosen = [going[row] for row in rows]
            found.update(zip(chosen, self._branch([forks[i] for i in chosen]), strict=True))
        return [found[i] for i in range(len(forks))]

    def _branch(self, forks: list[Fork]) -> list[Decoded]:
        device = self.model.device
        at_B = torch.tensor([fork.at for fork in forks], device=device)
        length_B = torch.tensor([self.lengths[fork.row] for fork in forks], device=device)
        prompt, width = max(self.lengths), max(self.lengths) + max(fork.at for fork in forks)
        slot_S = torch.arange(width + self.max_new_tokens, device=device)
        in_trunk_BS = (slot_S >= prompt - length_B[:, None]) & (slot_S < prompt + at_B[:, None])
        start = _Start(
            cache=self.kept.cache([fork.row for fork in forks], width),
            ids_BS=torch.tensor([[fork.token] for fork in forks], device=device),
            position_BS=(length_B + at_B)[:, None],
            mask_BS=in_trunk_BS | (slot_S >= width),
            limit_B=self.max_new_tokens - at_B - 1,
        )
        return _run(self.model, start, ends=self.ends)


@dataclass
class _Start:
    """Where decoding starts: the tokens to feed, their positions, and what is in the cache already. `mask_BS` covers
    the cache, the tokens to feed and all that can follow; `limit_B` is how many tokens a row may get."""

    cache: Cache
    ids_BS: torch.Tensor
    position_BS: torch.Tensor
    mask_BS: torch.Tensor
    limit_B: torch.Tensor

    @classmethod
    def of_prompts(cls, model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> _Start:
        """Prompts aligned at their ends."""
        width, device = max(len(prompt) for prompt in prompts), model.device
        length_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
        slot_S = torch.arange(width + max_new_tokens, device=device)
        first_B1 = (width - length_B)[:, None]
        return cls(
            cache=Cache(layer_class_to_replicate=_Layer),
            ids_BS=torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device),
            position_BS=(slot_S[:width] - first_B1).clamp(min=0),
            mask_BS=slot_S >= first_B1,
            limit_B=torch.full_like(length_B, max_new_tokens),
        )


@torch.inference_mode()
def _run(
    model: PreTrainedModel,
    start: _Start,
    *,
    ends: Sequence[int],
    top: int = 0,
    kept: _Kept | None = None,
    uniform_BN: torch.Tensor | None = None,
) -> list[Decoded]:
    """Decode from a start to the end of every row; everything stays on the device until all rows are done."""
    cache, ids_BS, position_BS = start.cache, start.ids_BS, start.position_BS
    mask_BS, limit_B = start.mask_BS, start.limit_B
    device, rows = ids_BS.device, len(ids_BS)
    end_E = torch.tensor(list(ends), device=device)
    row_B = torch.arange(rows, device=device)
    alive_B = torch.ones(rows, dtype=torch.bool, device=device)
    ended_R = torch.zeros(rows, dtype=torch.bool, device=device)
    count_R = torch.zeros(rows, dtype=torch.long, device=device)
    steps: list[tuple[torch.Tensor, ...]] = []
    length, step, alive = ids_BS.shape[1] + cache.get_seq_length(), 0, rows
    with _evaluating(model):
        while alive:
            logits_BV = model(
                input_ids=ids_BS,
                attention_mask=mask_BS[:, :length],
                position_ids=position_BS,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1].float()  # fmt: skip
            logp_BV = logits_BV.log_softmax(dim=-1)
            p_BV = logp_BV.exp()
            if uniform_BN is None:
                token_B = logits_BV.argmax(dim=-1)
            else:
                drawn_B = (p_BV.cumsum(dim=-1) <= uniform_BN[row_B, step, None]).sum(dim=-1)
                token_B = drawn_B.clamp(max=p_BV.shape[-1] - 1)  # the sum of probabilities may round to less than 1
            top_BK = p_BV.topk(min(top, p_BV.shape[-1]), dim=-1)
            chosen_B = logp_BV.gather(1, token_B[:, None])[:, 0]
            steps.append((row_B, token_B, chosen_B, torch.special.entr(p_BV).sum(-1), top_BK.indices, top_BK.values))
            step += 1
            count_R[row_B[alive_B]] = step
            stops_B = torch.isin(token_B, end_E)
            ended_R[row_B[alive_B & stops_B]] = True
            alive_B = alive_B & ~stops_B & (step < limit_B)
            alive = int(alive_B.sum())
            if alive <= FULL * len(alive_B):
                if kept is not None:
                    kept.keep(cache, row_B[~alive_B], (~alive_B).nonzero()[:, 0])
                if not alive:
                    break
                going = alive_B.nonzero()[:, 0]
                cache.batch_select_indices(going)
                row_B, alive_B, limit_B, token_B = row_B[going], alive_B[going], limit_B[going], token_B[going]
                position_BS, mask_BS = position_BS[going], mask_BS[going]
            ids_BS, position_BS, length = token_B[:, None], position_BS[:, -1:] + 1, length + 1
    return _collect(steps, count_R.tolist(), ended_R.tolist())


def _collect(steps: list[tuple[torch.Tensor, ...]], counts: list[int], ended: list[bool]) -> list[Decoded]:
    """Sort the records of all steps by row, in one transfer; a row's records behind its end are left out."""
    row_N, *values = (torch.cat(column).cpu().numpy() for column in zip(*steps, strict=True))
    order_N = np.argsort(row_N, kind="stable")
    first_R = np.searchsorted(row_N[order_N], np.arange(len(counts)))
    found = []
    for first, count, stopped in zip(first_R, counts, ended, strict=True):
        ids, logps, entropy, top_ids, top_p = (value[order_N[first : first + count]] for value in values)
        finish = "stop" if stopped else "length"
        found.append(Decoded(ids.tolist(), finish, logps.tolist(), entropy.tolist(), top_ids, top_p))
    return found


class _Layer(DynamicLayer):
    """Keys and values `[B, heads, slots, width]` that grow within reserved room: a step copies nothing but itself."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rooms = [x[:, :, :0] for x in (key_states, value_states)]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for i, new in enumerate((key_states, value_states)):
            if end > self.rooms[i].shape[-2]:
                larger = new.new_empty(*new.shape[:2], end + ROOM, new.shape[-1])
                larger[:, :, :start] = self.rooms[i][:, :, :start]
                self.rooms[i] = larger
            self.rooms[i][:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        end = self.get_seq_length()
        self.rooms = [room[indices] for room in self.rooms]
        self.keys, self.values = (room[:, :, :end] for room in self.rooms)


class _Kept:
    """The cache rows of a batch, laid aside as the rows ended."""

    def __init__(self) -> None:
        self.parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self.place: dict[int, tuple[int, int]] = {}  # row -> part, index in the part

    def keep(self, cache: Cache, row_B: torch.Tensor, index_B: torch.Tensor) -> None:
        """Lay aside what stands at `index_B` of the cache, which belongs to the rows `row_B`."""
        for i, row in enumerate(row_B.tolist()):
            self.place[row] = (len(self.parts), i)
        layers: list[Any] = cache.layers  # of `_Layer`
        self.parts.append([(layer.keys[index_B], layer.values[index_B]) for layer in layers])

    @torch.inference_mode()
    def cache(self, rows: Sequence[int], width: int) -> Cache:
        """A cache of copies of rows, each `width` slots long; where a row has less, the slots are zero."""
        places = torch.tensor([self.place[row] for row in rows])
        cache = Cache(layer_class_to_replicate=_Layer)
        for layer in range(len(self.parts[0])):
            copies = []
            for side in (0, 1):
                sample = self.parts[0][layer][side]
                copy = sample.new_zeros(len(rows), sample.shape[1], width, sample.shape[3])
                for part, layers in enumerate(self.parts):
                    to = (places[:, 0] == part).nonzero()[:, 0]
                    source = layers[layer][side][:, :, :width]
                    copy[to.to(copy.device), :, : source.shape[2]] = source[places[to, 1].to(copy.device)]
                copies.append(copy)
            cache.update(copies[0], copies[1], layer)
        return cache


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
