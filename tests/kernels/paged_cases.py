"""What the tests of paged attention share: passes over a paged cache, its content, and how far results may be off."""

from __future__ import annotations

import random

import torch
from ttpa_kernels.paged_attention.op import Segment, paged_attention, paged_layout
from ttpa_kernels.paged_attention.reference import paged_attention_reference

PAGE = 16
IDLE = Segment([0], 0, 1, 0, 0)


class Pages:
    """Page numbers, handed out in runs of random order, so that sequences are made of few runs and of many."""

    def __init__(self, seed: int, *, longest_run: int = 6) -> None:
        self.random, self.next, self.waiting = random.Random(seed), 1, []
        self.longest_run = longest_run

    def take(self, number: int) -> list[int]:
        while len(self.waiting) < number:
            runs = [[] for _ in range(4)]
            for run in runs:
                length = self.random.randint(1, self.longest_run)
                run += range(self.next, self.next + length)
                self.next += length
            self.random.shuffle(runs)
            self.waiting += [page for run in runs for page in run]
        taken, self.waiting = self.waiting[:number], self.waiting[number:]
        return taken


def pages_for(length: int) -> int:
    return -(-length // PAGE)


def branches(pages: Pages, prompt: int, *branches: tuple[int, int], group: int = 0) -> list[Segment]:
    """Sequences behind one prompt, of (tokens in the cache behind it, new tokens); the full pages of it are shared."""
    prefix = pages.take(prompt // PAGE)
    found = []
    for held, count in branches:
        own = pages.take(pages_for(prompt + held + count) - len(prefix))
        found.append(Segment(prefix + own, prompt + held, count, group, len(prefix) * PAGE))
    return found


def alone(pages: Pages, start: int, count: int) -> list[Segment]:
    """A sequence that shares nothing."""
    return [Segment(pages.take(pages_for(start + count)), start, count, 0, 0)]


def passes() -> dict[str, list[Segment]]:
    pages, apart = Pages(0), Pages(1, longest_run=1)
    one, other = (branches(pages, 48, (2, 1), (9, 3), (17, 1), group=group) for group in (1, 2))
    return {
        "one prompt": alone(pages, 0, 37),
        "one token of a sequence": alone(pages, 300, 1),
        "one token of a sequence in many runs": alone(apart, 400, 1),
        "branches behind a prompt": branches(pages, 100, (0, 1), (5, 1), (40, 1), (12, 1)),
        "branches behind a prompt in many runs": branches(apart, 170, (0, 1), (5, 2)),
        "drafts of different lengths": branches(pages, 64, (3, 1), (9, 7), (0, 4)),
        "two trees and rows without work": [*one[:2], IDLE, *branches(pages, 33, (1, 1), (0, 2), group=5), IDLE],
        "trees mixed up": [segment for pair in zip(one, other, strict=True) for segment in pair],
        "prompts behind a shared beginning": branches(pages, 100, (0, 70), (0, 65), (0, 12)),
        "a long draft among short ones": branches(pages, 64, (3, 1), (9, 66), (0, 4)),
        "prompts together": alone(pages, 0, 30) + alone(pages, 0, 70) + alone(pages, 0, 3),
    }


PASSES = passes()


def random_pass(seed: int, *, longest: int = 90) -> list[Segment]:
    """Trees with branches of branches, sequences of their own, idle rows and long segments, in any order."""
    pages, draw = Pages(seed, longest_run=random.Random(seed).choice([1, 2, 9])), random.Random(seed)
    found: list[Segment] = []
    for group in range(draw.randint(0, 3)):
        sizes = [(draw.randint(0, longest), draw.choice([1, 1, 1, 2, 5])) for _ in range(draw.randint(1, 6))]
        tree = branches(pages, draw.randint(1, longest), *sizes, group=group)
        parent = tree[0]
        at = draw.randint(parent.shared // PAGE, parent.start // PAGE)  # one more shares full pages of the first
        own = pages.take(pages_for(parent.start + 3) - at)
        found += [*tree, parent._replace(pages=parent.pages[:at] + own, count=draw.randint(1, 3))]
    for _ in range(draw.randint(0, 2)):
        found += alone(pages, draw.choice([0, draw.randint(1, longest)]), draw.choice([1, 3, 20]))
    if draw.random() < 0.3:
        found += alone(pages, draw.choice([0, 7, longest]), 70)
    found += [IDLE] * draw.randint(0, 2)
    draw.shuffle(found)
    return found or [IDLE]


def cache(segments, *, N=4, G=2, D=16, dtype=torch.float32, device="cpu", fill=torch.nan, seed=0, T=None):
    """Query, key and value caches: what some segment has written is random, all else is `fill`."""
    generator = torch.Generator().manual_seed(seed)
    number = 1 + max(max(segment.pages) for segment in segments)
    written = torch.zeros(number * PAGE, dtype=torch.bool)
    for pages, start, count, _, _ in segments:
        for position in range(start + count):
            written[pages[position // PAGE] * PAGE + position % PAGE] = True
    key, value = torch.randn(2, G, number * PAGE, D, generator=generator)
    for x in (key, value):
        x[:, ~written] = fill
    T = T or sum(segment.count for segment in segments)
    query = torch.randn(1, T, N, D, generator=generator).transpose(1, 2)
    return tuple(x.to(device, dtype) for x in (query, key, value))


def attend(segments, *tensors, engine="torch", **options):
    layout = paged_layout(segments, page_size=PAGE, device=tensors[0].device, engine=engine)
    return paged_attention(*tensors, layout, **options)


def assert_as_good_as_eager(got, segments, query, key_GSD, value_GSD, *, scale: float | None = None):
    """At most 1.5 times as far from float64 as a softmax written out in the same dtype."""
    want, eager = (
        paged_attention_reference(query, key_GSD, value_GSD, segments, page_size=PAGE, scale=scale, dtype=dtype)
        for dtype in (torch.float64, query.dtype)
    )
    assert got.shape == want.shape and got.dtype == query.dtype and got.is_contiguous()
    allowed = 1.5 * (eager - want).norm() + 5e-7 * want.norm()
    assert (got - want).norm() <= allowed, (float((got - want).norm()), float(allowed))
