from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import random_tree

from ttpa.losses import token_dpo_loss
from ttpa.model import packed_logps, use_tree_attention
from ttpa.training.examples import Example
from ttpa.training.packing import best_fit, plan_step, split_example
from ttpa.trees.pack import Term, completion_tokens, pack_trees, packed_tokens
from ttpa.trees.record import Leaf, Node, Pair, PreferenceTree

SEEDS = st.lists(st.integers(0, 10_000), max_size=12, unique=True)
LAYOUT = {"pack_tokens": st.integers(5, 90), "world_size": st.integers(1, 5), "whole": st.booleans()}


def example(seed: int) -> Example:
    """A random tree whose weights and reference log-probabilities are all different."""
    tree, rng = random_tree(seed, tools=seed % 3 == 0), np.random.default_rng(seed)
    weights = [
        [tuple(rng.random(len(tree.trained(leaf))).tolist() for leaf in (p.chosen, p.rejected)) for p in tree.pairs]
        for _ in range(2)
    ]
    logps = rng.standard_normal(completion_tokens(tree)).astype(np.float32)
    return Example(tree, weights, logps)


def of_size(tokens: int, name: str = "tree") -> Example:
    """One pair in `tokens` packed tokens."""
    nodes = [Node(-1, [1, 2]), Node(-1, [3])]
    tree = PreferenceTree(name, [4] * (tokens - 3), nodes, [Leaf(0, "given"), Leaf(1, "given")], [Pair(0, 1)])
    return Example(tree, [[([1.0, 1.0], [1.0])]])


def cost(example: Example) -> float:
    tokens = packed_tokens(example.tree)
    return tokens * (20_000 + tokens)  # about a model of 4B parameters


def plan_of(examples, *, pack_tokens, world_size=1, cost=cost, whole=False):
    return plan_step(examples, pack_tokens=pack_tokens, world_size=world_size, cost=cost, whole=whole)


def pairs_of(examples) -> Counter:
    """All pairs with what belongs to them."""
    return Counter(
        (e.tree.id, pair.chosen, pair.rejected, pair.margin, *((*w[p][0], *w[p][1]) for w in e.weights))
        for e in examples
        for p, pair in enumerate(e.tree.pairs)
    )


@settings(deadline=None, max_examples=60)
@given(seeds=SEEDS, **LAYOUT)
def test_a_plan_has_every_pair_once_in_packs_of_the_budget(seeds, pack_tokens, world_size, whole):
    examples = [example(seed) for seed in seeds]
    plan = plan_of(examples, pack_tokens=pack_tokens, world_size=world_size, whole=whole)
    assert sorted(i for rank in plan.packs for pack in rank for i in pack) == list(range(len(plan.examples)))
    assert pairs_of(plan.examples) == pairs_of(examples)
    num_long = 0
    for rank, rank_tokens, rank_costs in zip(plan.packs, plan.tokens, plan.costs, strict=True):
        for pack, tokens, pack_cost in zip(rank, rank_tokens, rank_costs, strict=True):
            trees = [plan.examples[i].tree for i in pack]
            assert tokens == (len(pack_trees(trees).ids_T) if trees else 0)
            assert pack_cost == sum(cost(plan.examples[i]) for i in pack)
            num_long += tokens > pack_tokens
            if tokens > pack_tokens:  # a pair that is too long, with nothing that makes it longer
                longest = max(packed_tokens(replace(trees[0], pairs=[pair])) for pair in trees[0].pairs)
                assert len(pack) == 1 and (whole or tokens == longest)
    assert plan.num_long == num_long
    by_id = {e.tree.id: e for e in examples}
    for part in plan.examples:
        of = by_id[part.tree.id]
        assert part.tree.nodes is of.tree.nodes and part.tree.prompt_ids is of.tree.prompt_ids
        assert part.logps is of.logps
        assert not whole or part is of


@settings(deadline=None, max_examples=60)
@given(seeds=SEEDS, **LAYOUT)
def test_ranks_have_as_many_packs_and_no_more_than_best_fit_needs(seeds, pack_tokens, world_size, whole):
    examples = [example(seed) for seed in seeds]
    plan = plan_of(examples, pack_tokens=pack_tokens, world_size=world_size, whole=whole)
    needed = best_fit([packed_tokens(part.tree) for part in plan.examples], max_tokens=pack_tokens)
    assert [len(rank) for rank in plan.packs] == [-(-len(needed) // world_size)] * world_size


@settings(deadline=None, max_examples=60)
@given(seeds=SEEDS, rng=st.randoms(use_true_random=False), **LAYOUT)
def test_the_order_of_the_trees_changes_nothing(seeds, rng, pack_tokens, world_size, whole):
    examples = [of_size(30, f"equal{seed}") if seed % 2 else example(seed) for seed in seeds]
    plans = [
        plan_of(given, pack_tokens=pack_tokens, world_size=world_size, whole=whole)
        for given in (examples, rng.sample(examples, len(examples)))
    ]
    parts = [[(part.tree.id, part.tree.pairs) for part in plan.examples] for plan in plans]
    assert plans[0].packs == plans[1].packs and parts[0] == parts[1]


def ragged(seed: int, number: int, *, share_long: float = 0.0) -> list[Example]:
    """Trees of about 550 tokens, and a share of about 8000."""
    rng = random.Random(seed)
    tokens = [
        rng.lognormvariate(9.0, 0.15) if rng.random() < share_long else rng.lognormvariate(6.3, 0.5)
        for _ in range(number)
    ]
    return [of_size(4 + int(count), f"tree{i}") for i, count in enumerate(tokens)]


@pytest.mark.parametrize(("pack_tokens", "share_long"), [(4096, 0.0), (16384, 0.1)])
@pytest.mark.parametrize(("number", "world_size"), [(64, 4), (64, 2), (512, 8)])
def test_ragged_trees_are_balanced_over_ranks(number, world_size, pack_tokens, share_long):
    for seed in range(4):
        examples = ragged(seed, number, share_long=share_long)
        plan = plan_of(examples, pack_tokens=pack_tokens, world_size=world_size)
        longest = [max(place) for place in zip(*plan.costs, strict=True)]
        ideal = sum(map(sum, plan.costs)) / world_size  # no plan takes less time
        assert sum(longest) <= 1.05 * ideal
        assert plan.waste == pytest.approx(1 - ideal / sum(longest)) and plan.num_long == 0
        assert longest == sorted(longest, reverse=True)  # what needs the most memory runs first
        totals = [sum(rank) for rank in plan.costs]
        assert max(totals) - min(totals) <= max(max(place) - min(place) for place in zip(*plan.costs, strict=True))


def test_packs_are_full():
    examples = ragged(0, 200)
    total = sum(packed_tokens(e.tree) for e in examples)
    plan = plan_of(examples, pack_tokens=4096)
    assert len(plan.packs[0]) <= 1 + 1.02 * total / 4096
    assert plan.free == pytest.approx(1 - total / (4096 * len(plan.packs[0])))
    assert plan.waste == 0


def test_a_long_example_and_a_waiting_rank_are_reported():
    examples = [of_size(30, "long"), of_size(10, "short")]
    plan = plan_of(examples, pack_tokens=20, world_size=2, cost=lambda e: packed_tokens(e.tree))
    assert plan.packs == [[[0]], [[1]]] and plan.num_long == 1
    assert plan.waste == pytest.approx(1 - 40 / 60) and plan.free == pytest.approx(1 - 30 / 40)
    plan = plan_of(examples[1:], pack_tokens=20, world_size=3)
    assert plan.packs == [[[0]], [[]], [[]]] and plan.waste == pytest.approx(2 / 3)


def test_room_comes_before_balance():
    costs = {"a": 9, "b": 10, "c": 8, "d": 1}  # by cost alone a and c share a pack, and d finds no room
    examples = [of_size(tokens, name) for name, tokens in (("a", 4), ("b", 5), ("c", 5), ("d", 6))]
    plan = plan_of(examples, pack_tokens=10, cost=lambda e: costs[e.tree.id])
    names = [{plan.examples[i].tree.id for i in pack} for pack in plan.packs[0]]
    assert sorted(map(sorted, names)) == [["a", "d"], ["b", "c"]]


def test_parts_keep_branches_of_one_trunk_together():
    tree = PreferenceTree(
        "forks",
        [1] * 10,
        [Node(-1, [2] * 10), Node(-1, [3] * 40), *(Node(1, [4 + i] * 10) for i in range(4)), Node(-1, [9] * 40)]
        + [Node(6, [10 + i] * 10) for i in range(4)],
        [Leaf(0, "given"), *(Leaf(node, "given") for node in (2, 3, 4, 5, 7, 8, 9, 10))],
        [Pair(0, leaf) for leaf in (1, 5, 2, 6, 3, 7, 4, 8)],
    )
    weights = [[([1.0] * 10, [float(p)] * 50) for p in range(8)]]
    parts = split_example(Example(tree, weights), max_tokens=130)
    assert [[pair.rejected for pair in part.tree.pairs] for part in parts] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert [[rejected[0] for _, rejected in part.weights[0]] for part in parts] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [packed_tokens(part.tree) for part in parts] == [100, 100]
    assert [len(part.tree.pairs) for part in split_example(Example(tree, weights), max_tokens=5)] == [1] * 8
    whole = Example(tree, weights)
    assert split_example(whole, max_tokens=packed_tokens(tree)) == [whole]


def test_loss_and_gradient_do_not_depend_on_the_plan(tiny_model):
    model, examples = use_tree_attention(tiny_model), [example(seed) for seed in range(1, 5)]
    num_pairs = sum(len(e.tree.pairs) for e in examples)
    found = []
    for pack_tokens, world_size, order in ((10_000, 1, 1), (25, 1, -1), (25, 3, 1), (1, 2, -1)):
        model.zero_grad()
        plan = plan_of(examples[::order], pack_tokens=pack_tokens, world_size=world_size)
        loss = 0.0
        for pack in (pack for rank in plan.packs for pack in rank if pack):
            parts = [plan.examples[i] for i in pack]
            batch = pack_trees(
                [part.tree for part in parts],
                terms=[Term([part.weights[term] for part in parts]) for term in range(2)],
                logps=[part.logps for part in parts],
            )
            logp_R = packed_logps(model, batch, report=False)
            for term, share in zip(batch.terms, (1.0, 0.3), strict=True):
                part_loss, _ = token_dpo_loss(
                    logp_R=logp_R,
                    ref_logp_R=batch.ref_logp_R[: batch.num_trained],
                    C=term.C,
                    beta=0.1,
                    denominator=num_pairs / share,
                )
                part_loss.backward(retain_graph=True)
                loss += part_loss.item()
        found.append((len(plan.examples), loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert found[0][0] == len(examples) < found[1][0] < found[3][0] == num_pairs
    for _, loss, grad in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=1e-6)
        assert (grad - found[0][2]).norm() < 1e-6 * found[0][2].norm()
