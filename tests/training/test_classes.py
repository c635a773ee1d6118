"""The metrics by class against plain loops."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import numpy as np
import pytest
import torch
from random_trees import random_tree

from ttpa.training.classes import SUMS, class_metrics, class_sums
from ttpa.trees.classes import CLASSES
from ttpa.trees.pack import completion_tokens, pack_trees
from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions


def random_pack(*, tools=True):
    """Trees, one with a leaf inside another, with tokens that the model did not write if `tools`; a random class
    for each token, and random log-probabilities."""
    trees = [random_tree(seed, num_leaves=5, tools=tools) for seed in range(4)]
    nodes, leaves = merge_completions(Completion([5, 6, 7, 8, 9][:length], Leaf(0, "given")) for length in (5, 3))
    trees.append(PreferenceTree("inside", [1], nodes, leaves, [Pair(0, 1), Pair(1, 0)]))
    rng = np.random.default_rng(0)
    classes = [rng.integers(0, len(CLASSES), completion_tokens(tree), dtype=np.int8) for tree in trees]
    pack = pack_trees(trees)
    logp_R, ref_logp_R = torch.randn(2, len(pack.row_R), generator=torch.Generator().manual_seed(0))
    return trees, classes, pack, logp_R, ref_logp_R


def sums_by_loop(trees, classes, pack, logp_R, ref_logp_R, beta):
    """For each pair a dict: margin by class where its sides differ there, and (class, margin) at its fork."""
    place = {int(p): r for r, p in enumerate(pack.place_R)}
    found, offset = [], 0
    for tree, of_tree in zip(trees, classes, strict=True):
        starts = np.cumsum([0, *(len(node.ids) for node in tree.nodes)])
        for pair in tree.pairs:
            sides = []
            for leaf in (pair.chosen, pair.rejected):
                places = [p for n in tree.path(leaf) for p in range(starts[n], starts[n + 1])]
                sides.append([p for p, t in zip(places, tree.trained(leaf), strict=True) if t])
            both = [tree.completion_ids(leaf) for leaf in (pair.chosen, pair.rejected)]
            fork = next((i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b), None)
            margins, at_fork = {}, []
            for sign, side, leaf in ((1, sides[0], pair.chosen), (-1, sides[1], pair.rejected)):
                for p in side:
                    if p in sides[0] and p in sides[1]:
                        continue
                    row = place[offset + p]
                    reward = sign * beta * (float(logp_R[row]) - float(ref_logp_R[row]))
                    name = CLASSES[of_tree[p]]
                    margins[name] = margins.get(name, 0.0) + reward
                    path = [q for n in tree.path(leaf) for q in range(starts[n], starts[n + 1])]
                    if path.index(p) == fork:
                        at_fork.append((name, reward))
            fork_margin = (at_fork[0][0], at_fork[0][1] + at_fork[1][1]) if len(at_fork) == 2 else None
            found.append((margins, fork_margin))
        offset += len(of_tree)
    return found


@pytest.mark.parametrize("tools", [False, True])
def test_metrics_by_class_are_those_of_a_loop(tools):
    trees, classes, pack, logp_R, ref_logp_R = random_pack(tools=tools)
    sums = class_sums(pack, np.concatenate(classes), logp_R=logp_R, ref_logp_R=ref_logp_R, beta=0.2)
    found = class_metrics(sums)
    pairs = sums_by_loop(trees, classes, pack, logp_R, ref_logp_R, 0.2)
    want = {}
    for name in CLASSES:
        margins = [by_class[name] for by_class, _ in pairs if name in by_class]
        want[f"rewards/margins/{name}"] = sum(margins) / len(pairs)
        want[f"rewards/accuracies/{name}"] = mean(margin > 0 for margin in margins)
        share = sum(fork is not None and fork[0] == name for _, fork in pairs) / len(pairs)
        want |= {f"fork/shares/{name}": share} if share else {}
    forks = [fork[1] for _, fork in pairs if fork is not None]
    assert 0 < len(forks) <= len(pairs) - 2, "where one side ends inside the other there is no fork"
    want |= {"fork/margins": mean(forks), "fork/accuracies": mean(margin > 0 for margin in forks)}
    assert found == pytest.approx(want, rel=1e-6, abs=1e-9)


def test_margins_of_the_classes_add_up_to_the_margin():
    _, classes, pack, logp_R, ref_logp_R = random_pack()
    found = class_metrics(class_sums(pack, np.concatenate(classes), logp_R=logp_R, ref_logp_R=ref_logp_R, beta=0.5))
    gain_R = 0.5 * (logp_R.double() - ref_logp_R.double())
    margin = (pack.chosen_PR @ gain_R - pack.rejected_PR @ gain_R).mean().item()
    assert sum(found[f"rewards/margins/{name}"] for name in CLASSES) == pytest.approx(margin, abs=1e-9)


def test_sums_do_not_depend_on_how_pairs_are_packed():
    trees, classes, pack, _, _ = random_pack()
    value = torch.randn(sum(map(len, classes)))
    whole = class_sums(pack, np.concatenate(classes), logp_R=value[pack.place_R], ref_logp_R=torch.zeros(1), beta=0.1)
    parts, offset = [], 0
    for tree, of_tree in zip(trees, classes, strict=True):
        for half in (tree.pairs[:1], tree.pairs[1:]):
            part = pack_trees([replace(tree, pairs=half)])
            logp_R = value[offset + part.place_R]
            parts.append(class_sums(part, of_tree, logp_R=logp_R, ref_logp_R=torch.zeros(1), beta=0.1))
        offset += len(of_tree)
    added = {name: sum(part[name] for part in parts) for name in SUMS}
    assert added == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_equal_models_have_no_margin_and_nothing_right():
    _, classes, pack, logp_R, _ = random_pack()
    sums = class_sums(pack, np.concatenate(classes), logp_R=logp_R, ref_logp_R=logp_R, beta=0.1)
    assert all(value == 0 for name, value in sums.items() if name.split("/")[0] in ("margins", "right"))
    assert sums["fork/pairs"] > 0 == sums["fork/margins"] == sums["fork/right"]


def test_no_pairs_give_no_metrics():
    assert class_metrics(dict.fromkeys(SUMS, 0.0)) == {}
    tree = random_tree(0)
    pack = pack_trees([replace(tree, pairs=[Pair(0, 0)])])
    logp_R = torch.randn(len(pack.row_R))
    classes = np.zeros(completion_tokens(tree), dtype=np.int8)
    assert class_metrics(class_sums(pack, classes, logp_R=logp_R, ref_logp_R=0 * logp_R, beta=0.1)) == {}
