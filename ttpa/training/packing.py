"""The packs of one optimizer step: trees cut to the token budget and balanced over ranks."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ttpa.training.examples import Example
from ttpa.trees.pack import packed_tokens


@dataclass(frozen=True)
class StepPlan:
    """Which examples of a step each rank packs together.

    `examples`, the costliest first, are those of the step, cut where they were too long. `packs[rank][place]` are
    indexes into them. Every rank has as many places, and an empty list where nothing is left for it. The packs of one
    place run at the same time and wait for each other; the costliest place comes first. `tokens` and `costs` hold the
    sums over each pack, in the shape of `packs`.
    """

    examples: list[Example]
    packs: list[list[list[int]]]
    tokens: list[list[int]]
    costs: list[list[float]]
    pack_tokens: int

    @property
    def waste(self) -> float:
        """The share of the ranks' time that is spent waiting for the slowest of a place:
        `1 - sum of costs / (ranks * sum over places of the highest cost)`."""
        longest = sum(max(costs) for costs in zip(*self.costs, strict=True))
        return 1 - sum(map(sum, self.costs)) / (len(self.packs) * longest) if longest else 0.0

    @property
    def free(self) -> float:
        """The share of the packs' room for tokens that is left free."""
        room = self.pack_tokens * sum(map(len, self.packs))
        return 1 - sum(min(tokens, self.pack_tokens) for rank in self.tokens for tokens in rank) / room if room else 0.0

    @property
    def num_long(self) -> int:
        """The number of packs over the budget, each a single example that cannot be cut further."""
        return sum(tokens > self.pack_tokens for rank in self.tokens for tokens in rank)


def plan_step(
    examples: Sequence[Example],
    *,
    pack_tokens: int,
    world_size: int,
    cost: Callable[[Example], float],
    whole: bool,
) -> StepPlan:
    """Lay the examples of one optimizer step out as packs of at most `pack_tokens` tokens, equally many on each rank.

    Examples that are longer are cut by `split_example`, unless a loss needs them `whole`; what is longer even so has a
    pack to itself. There are as many packs as best fit needs, rounded up to a multiple of the ranks, and the packs that
    run side by side cost about the same (`cost` of an example is its share of a pack's, in any unit). The order of the
    examples changes nothing.
    """
    parts = [
        part
        for example in examples
        for part in ([example] if whole else split_example(example, max_tokens=pack_tokens))
    ]
    sizes = [(cost(part), packed_tokens(part.tree)) for part in parts]
    order = sorted(range(len(parts)), key=lambda i: (-sizes[i][0], -sizes[i][1], parts[i].tree.id, i))
    costs, tokens = [sizes[i][0] for i in order], [sizes[i][1] for i in order]

    fewest = best_fit(tokens, max_tokens=pack_tokens)
    number = -(-len(fewest) // world_size) * world_size
    packs = _even_packs(costs, tokens, number=number, world_size=world_size, max_tokens=pack_tokens)
    if packs is None:
        packs = fewest + [[] for _ in range(number - len(fewest))]
    # side by side in order of their costs, packs wait the least for each other
    packs.sort(key=lambda pack: -sum(costs[i] for i in pack))
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    total = [0.0] * world_size
    for first in range(0, number, world_size):
        least_first = sorted(range(world_size), key=total.__getitem__)
        for rank, pack in zip(least_first, packs[first : first + world_size], strict=True):
            ranks[rank].append(pack)
            total[rank] += sum(costs[i] for i in pack)
    return StepPlan(
        examples=[parts[i] for i in order],
        packs=ranks,
        tokens=[[sum(tokens[i] for i in pack) for pack in rank] for rank in ranks],
        costs=[[sum(costs[i] for i in pack) for pack in rank] for rank in ranks],
        pack_tokens=pack_tokens,
    )


def split_example(example: Example, *, max_tokens: int) -> list[Example]:
    """Cut an example at the root into parts of at most `max_tokens` packed tokens, each with some of its pairs.

    Every pair is in exactly one part, with its weights; all parts have the prompt, the nodes and the reference
    log-probabilities of the whole tree. Pairs go, in depth-first order, where they add the fewest tokens. A pair that
    is longer on its own is never cut: its part is as long as it is.
    """
    tree = example.tree
    if packed_tokens(tree) <= max_tokens:
        return [example]
    nodes_P = [{*tree.path(pair.chosen), *tree.path(pair.rejected)} for pair in tree.pairs]
    parts: list[tuple[list[int], set[int]]] = []  # pairs and nodes

    def tokens(nodes: set[int]) -> int:
        return sum(len(tree.nodes[n].ids) for n in nodes)

    for p in sorted(range(len(nodes_P)), key=lambda p: sorted(nodes_P[p], reverse=True)):
        room = max_tokens - len(tree.prompt_ids)
        added = {part: tokens(nodes_P[p] - nodes) for part, (_, nodes) in enumerate(parts)}
        fits = [part for part in added if not added[part] or tokens(parts[part][1]) + added[part] <= room]
        if not fits:
            parts.append(([], set()))
        pairs, nodes = parts[min(fits, key=added.__getitem__, default=-1)]
        pairs.append(p)
        nodes |= nodes_P[p]
    return [
        replace(
            example,
            tree=replace(tree, pairs=[tree.pairs[p] for p in pairs]),
            weights=[[weights[p] for p in pairs] for weights in example.weights],
        )
        for pairs in sorted(sorted(pairs) for pairs, _ in parts)
    ]


def best_fit(sizes: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Group indexes so that the sizes of a group add up to at most `max_tokens`: each, the largest first, goes into the
    group that it fills best. What is larger than `max_tokens` is a group of its own."""
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, group), ascending
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect_left(free, (sizes[i], -1))
        left, group = free.pop(at) if at < len(free) else (max_tokens, len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(i)
        insort(free, (left - sizes[i], group))
    return groups


def _even_packs(
    costs: Sequence[float], tokens: Sequence[int], *, number: int, world_size: int, max_tokens: int
) -> list[list[int]] | None:
    """`number` packs, those of a place about as costly as each other; None where an example found no room.

    Costs come in descending order. A place takes `world_size` packs up to the mean cost of what is left, or up to the
    costliest example left where that is more; within it, each example goes into the pack of the lowest cost that has
    room (longest processing time first: Graham 1969). So a large example has others of its kind beside it, and the
    small ones fill the last place, or whatever room there is.
    """
    packs: list[list[int]] = [[] for _ in range(number)]
    cost, room = [0.0] * number, [math.inf] * number  # what is longer than a pack fits into an empty one
    least_cost, least_tokens = min(costs, default=0), min(tokens, default=0)

    def fill(among: range, examples: list[int], limit: float) -> list[int]:
        """Put examples into some packs up to a cost, and return those that are left."""
        left: list[int] = []
        still, most_room = list(among), math.inf
        for at, i in enumerate(examples):
            if not still:
                return left + examples[at:]
            fits = tokens[i] <= most_room and [p for p in still if tokens[i] <= room[p] and cost[p] + costs[i] <= limit]
            if not fits:
                left.append(i)
                continue
            pack = min(fits, key=cost.__getitem__)
            room[pack] = (room[pack] if packs[pack] else max_tokens) - tokens[i]
            cost[pack] += costs[i]
            packs[pack].append(i)
            still = [p for p in still if least_tokens <= room[p] and cost[p] + least_cost <= limit]
            most_room = max((room[p] for p in still), default=0)
        return left

    left, cost_left = list(range(len(costs))), math.fsum(costs)
    for first in range(0, number - world_size, world_size):
        place = range(first, first + world_size)
        limit = max(costs[left[0]], cost_left / (number - first)) if left else 0
        left = fill(place, left, limit)
        cost_left -= sum(cost[pack] for pack in place)
    left = fill(range(number - world_size, number), left, math.inf)
    left = fill(range(number), left, math.inf)
    return None if left else packs
