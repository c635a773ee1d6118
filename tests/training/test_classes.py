"""Token classes, and the metrics by class against plain loops."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, pairwise
from statistics import mean

import numpy as np
import pytest
import torch
from hesitant import TOOLS
from random_trees import random_tree

from ttpa.training.classes import CLASSES, SUMS, add_sums, class_counts, class_metrics, class_sums, tree_classes
from ttpa.trees.pack import completion_tokens, pack_trees
from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions

END, OPEN, CLOSE = "<|im_end|>", "<tool_call>", "</tool_call>"


def calling(city):
    return f'{OPEN}\n{{"name": "weather", "arguments": {{"city": "{city}", "days": 2}}}}\n{CLOSE}'


def tree_of(tokenizer, *texts, pairs=()):
    completions = [
        Completion(tokenizer(text, add_special_tokens=False)["input_ids"], Leaf(0, "given")) for text in texts
    ]
    nodes, leaves = merge_completions(completions)
    return PreferenceTree("t", [1], nodes, leaves, [Pair(*pair) for pair in pairs], tools=TOOLS)


def runs(tokenizer, tree, leaf=0):
    """The text of a completion in runs of one class."""
    classes, starts = tree_classes(tree, tokenizer), np.cumsum([0, *(len(node.ids) for node in tree.nodes)])
    tokens = [
        (token, CLASSES[classes[starts[n] + at]]) for n in tree.path(leaf) for at, token in enumerate(tree.nodes[n].ids)
    ]
    return [(tokenizer.decode([t for t, _ in run]), name) for name, run in groupby(tokens, key=lambda pair: pair[1])]


def test_every_part_of_a_turn_has_its_class(tokenizer):
    assert runs(tokenizer, tree_of(tokenizer, f"Well: {calling('Rome')} done{END}")) == [
        ("Well: ", "text"),
        (f'{OPEN}\n{{"name": ', "scaffolding"),
        ('"weather"', "tool_name"),
        (', "arguments": {', "scaffolding"),
        ('"city"', "argument_key"),
        (": ", "scaffolding"),
        ('"Rome"', "argument_value"),
        (", ", "scaffolding"),
        ('"days"', "argument_key"),
        (": ", "scaffolding"),
        ("2", "argument_value"),
        (f"}}}}\n{CLOSE}", "scaffolding"),
        (" done", "text"),
        (END, "end_of_turn"),
    ]


def test_tool_results_and_headers_are_told_from_what_the_model_says(tokenizer):
    result = f"<tool_response>\n{calling('Oslo')}\n</tool_response>"
    turns = (f"user\nNow: {result}", "tool\n18 C", "assistant\nIt is 18")
    text = "".join([f"Hm{END}", *(f"\n<|im_start|>{turn}{END}" for turn in turns)])
    assert runs(tokenizer, tree_of(tokenizer, text)) == [
        ("Hm", "text"),
        (END, "end_of_turn"),
        ("\n<|im_start|>user\n", "scaffolding"),
        ("Now: ", "text"),
        (result, "tool_result"),
        (END, "end_of_turn"),
        ("\n<|im_start|>tool\n", "scaffolding"),
        ("18 C", "tool_result"),
        (END, "end_of_turn"),
        ("\n<|im_start|>assistant\n", "scaffolding"),
        ("It is 18", "text"),
        (END, "end_of_turn"),
    ]


def test_any_special_token_at_the_end_ends_the_turn(tokenizer):
    assert runs(tokenizer, tree_of(tokenizer, "Hm<|endoftext|>")) == [("Hm", "text"), ("<|endoftext|>", "end_of_turn")]


def test_what_cannot_be_read_is_text_but_not_what_was_read_before_it(tokenizer):
    found = runs(tokenizer, tree_of(tokenizer, f'{OPEN}\n{{"name": "weather", oops'))
    assert ('"weather"', "tool_name") in found and found[-1][1] == "text" and found[-1][0].endswith("oops")


def test_a_shared_token_has_its_class_from_the_preferred_completion(tokenizer):
    cut = calling("Rome")[: calling("Rome").index("city") - 1]
    texts = (f"{cut}oops", calling("Rome"))
    shared = ('"weather"', "tool_name"), (', "arguments": {', "scaffolding")
    found = runs(tokenizer, tree_of(tokenizer, *texts, pairs=[(1, 0)]), leaf=1)
    assert [run for run in found if run in shared] == [*shared]
    other = runs(tokenizer, tree_of(tokenizer, *texts, pairs=[(0, 1)]), leaf=1)
    assert (', "arguments": {', "scaffolding") not in other, "in the broken call they could not be read"


def test_a_node_without_a_leaf_is_text(tokenizer):
    tree = tree_of(tokenizer, calling("Rome"), calling("Oslo"))
    tree.leaves.pop()
    found = tree_classes(tree, tokenizer)
    assert len(found) == completion_tokens(tree)
    assert {CLASSES[c] for c in found[-len(tree.nodes[-1].ids) :]} == {"text"}


def test_a_token_over_several_classes_has_the_first_of_them(tokenizer, monkeypatch):
    text = calling("Rome")
    ends = [text.index(part) for part in ("weather", "city", '"Rome"', '"days"')]
    cuts = [0, len(OPEN), ends[0] + 3, ends[1] + 2, ends[2], ends[3], len(text)]
    spans = list(pairwise(cuts))
    monkeypatch.setattr("ttpa.training.classes.token_spans", lambda tokenizer, ids: (text, spans))
    nodes, leaves = merge_completions([Completion(list(range(len(spans))), Leaf(0, "given"))])
    found = tree_classes(PreferenceTree("t", [1], nodes, leaves, [], tools=TOOLS), tokenizer)
    assert [CLASSES[c] for c in found] == [
        *("scaffolding", "tool_name", "tool_name", "argument_key", "argument_value", "argument_key")
    ]


def test_counts_name_every_class(tokenizer):
    tree = tree_of(tokenizer, f"{calling('Rome')}{END}", calling("Oslo"))
    counts = class_counts(tree_classes(tree, tokenizer))
    assert list(counts) == list(CLASSES) and sum(counts.values()) == completion_tokens(tree)
    assert (counts["tool_name"], counts["end_of_turn"], counts["text"]) == (len('"weather"'), 1, 0)


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
    assert add_sums(parts) == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_equal_models_have_no_margin_and_nothing_right():
    _, classes, pack, logp_R, _ = random_pack()
    sums = class_sums(pack, np.concatenate(classes), logp_R=logp_R, ref_logp_R=logp_R, beta=0.1)
    assert all(value == 0 for name, value in sums.items() if name.split("/")[0] in ("margins", "right"))
    assert sums["fork/pairs"] > 0 == sums["fork/margins"] == sums["fork/right"]


def test_no_pairs_give_no_metrics():
    assert class_metrics(add_sums([])) == {} and set(add_sums([])) == set(SUMS)
    tree = random_tree(0)
    pack = pack_trees([replace(tree, pairs=[Pair(0, 0)])])
    logp_R = torch.randn(len(pack.row_R))
    classes = np.zeros(completion_tokens(tree), dtype=np.int8)
    assert class_metrics(class_sums(pack, classes, logp_R=logp_R, ref_logp_R=0 * logp_R, beta=0.1)) == {}
