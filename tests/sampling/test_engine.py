"""The engine writes what its slow twin writes, whatever it writes side by side, and gives every page back."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hesitant import asking, calling

from ttpa.data.decisions import all_decisions
from ttpa.errors import InputError
from ttpa.model import use_tree_attention
from ttpa.sampling import SamplingOptions, SamplingReport, sample_trees
from ttpa.sampling.engine import MIN_SHARED, Engine, Need
from ttpa.sampling.passes import PAGE_SIZE, Feed, Passes, cache_shape
from ttpa.sampling.paths import PathWriter
from ttpa.sampling.pool import PagedSequence
from ttpa.sampling.reference import reference_paths
from ttpa.sampling.search import Search
from ttpa.sampling.stop import Stop, end_ids

LOOSE = SamplingOptions(
    min_entropy=0.001, min_probability=1e-4, min_ratio=1e-4, num_forks=4, max_leaves=9, max_new_tokens=90
)
OPTIONS = {
    "defaults": SamplingOptions(max_new_tokens=90),
    "loose": LOOSE,
    "first": dataclasses.replace(LOOSE, fork_order="first", min_distance=3),
    "deep": dataclasses.replace(LOOSE, max_depth=3, num_forks=2, max_leaves=12),
    "deep, first": dataclasses.replace(LOOSE, max_depth=2, fork_order="first", num_forks=2, max_leaves=12),
    "tokens": dataclasses.replace(LOOSE, max_tree_tokens=180, max_depth=2),
    "stop": dataclasses.replace(LOOSE, stop='"Rome'),
    "short": dataclasses.replace(LOOSE, max_new_tokens=40),
    "no drafts": dataclasses.replace(LOOSE, draft=False),
    "drawn": dataclasses.replace(LOOSE, temperature=1.0, seed=3),
    "drawn, warm": dataclasses.replace(LOOSE, temperature=1.4, seed=5),
    "drawn, filtered": dataclasses.replace(LOOSE, temperature=0.8, top_p=0.9, top_k=5, seed=2),
    "release": SamplingOptions(mode="release", num_samples=5, max_new_tokens=40, seed=7),
}


@pytest.fixture(scope="module")
def decisions(tokenizer):
    dialogues = [
        asking("right", "Rome"),
        asking("wrong", "Rome", calling("time")),
        asking("far", "Oslo"),
        asking(
            "two", "Rome", calling("weather", city="Rome", days=2), {"role": "tool", "content": "warm"}, calling("time")
        ),
    ]
    return all_decisions(dialogues, tokenizer)


def written(model, tokenizer, decisions, options, report=None):
    """The paths of every decision in order."""
    report = SamplingReport() if report is None else report
    found = dict(PathWriter(model, tokenizer, decisions, options=options).write(decisions, report=report))
    return [found[i] for i in range(len(decisions))]


def tokens(paths):
    return [[(name, decoded.ids, decoded.finish, decoded.complete) for name, decoded in tree] for tree in paths]


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_slow_twin(hesitant, tokenizer, decisions, name):
    options = OPTIONS[name]
    report = SamplingReport()
    paths = written(hesitant, tokenizer, decisions, options, report)
    ends = end_ids(hesitant, tokenizer)
    expected = [reference_paths(hesitant, tokenizer, d, options=options, ends=ends) for d in decisions]
    assert tokens(paths) == tokens(expected)
    assert max(len(tree) for tree in paths) > 1
    for tree, twin in zip(paths, expected, strict=True):
        for (_, ours), (_, theirs) in zip(tree, twin, strict=True):
            for field in ("logps", "entropy", "varentropy", "top_probabilities"):
                values = [torch.as_tensor(getattr(side, field), dtype=torch.float64) for side in (ours, theirs)]
                torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["loose", "deep", "drawn", "release"])
def test_neither_rows_nor_order_nor_drafts_change_a_tree(hesitant, tokenizer, decisions, name):
    options = OPTIONS[name]
    expected = tokens(written(hesitant, tokenizer, decisions, options))
    for rows in (1, 4, 16):
        fewer = dataclasses.replace(options, rows=rows)
        assert tokens(written(hesitant, tokenizer, decisions, fewer)) == expected
    order = list(range(len(decisions)))
    random.Random(0).shuffle(order)
    shuffled = tokens(written(hesitant, tokenizer, [decisions[i] for i in order], options))
    assert shuffled == [expected[i] for i in order]
    assert tokens(written(hesitant, tokenizer, decisions, dataclasses.replace(options, draft=False))) == expected


def test_equal_arguments_give_equal_bits(hesitant, tokenizer):
    dialogues = [asking(str(i), city) for i, city in enumerate(["Rome", "Oslo", "Lima", "Rome"])]
    runs = [sample_trees(hesitant, tokenizer, dialogues, options=LOOSE)[0] for _ in range(2)]
    assert runs[0] == runs[1]


def test_a_fork_at_every_position_equals_full_recomputation(hesitant, tokenizer, decisions):
    """Forks of forks too, so that pages are shared by more than two."""
    ids = decisions[0].prompt_ids + decisions[0].gold_ids
    options = SamplingOptions()
    passes = Passes(use_tree_attention(hesitant), options=options, shape=cache_shape(hesitant), num_pages=200)
    whole = PagedSequence()
    passes.pool.grow(whole, len(ids))
    passes.prefill([Feed(whole, ids, 0, 0)])
    other = [7, 9, 11]
    for at in range(1, len(ids)):
        child = passes.fork(whole, at)
        grandchild = passes.fork(child, at - 1)
        for sequence, start in ((child, at), (grandchild, at - 1)):
            passes.pool.grow(sequence, start + len(other))
            (found,) = passes.predict([Feed(sequence, other, 0, start // PAGE_SIZE * PAGE_SIZE)])
            with torch.no_grad():
                logits = hesitant(input_ids=torch.tensor([ids[:start] + other])).logits[0, start:].double()
            logp = logits.log_softmax(-1)
            torch.testing.assert_close(
                torch.tensor(found.decoded.logps).double(), logp.max(dim=-1).values, atol=1e-5, rtol=0
            )
            torch.testing.assert_close(
                torch.tensor(found.decoded.entropy).double(), -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=0
            )
            passes.pool.release(sequence)
    passes.pool.release(whole)
    assert passes.pool.num_used == 0


@pytest.mark.parametrize("name", ["loose", "deep", "first", "release"])
@pytest.mark.parametrize("spare", [0, 3, 90])
def test_few_pages_are_enough_and_all_come_back(hesitant, tokenizer, decisions, name, spare):
    """With just the pages of the largest tree, and with a few more; the trees are the same where none is dropped."""
    options = OPTIONS[name]
    stop = Stop(tokenizer, end_ids(hesitant, tokenizer))
    needs = [Need.of(len(d.prompt_ids), options) for d in decisions]
    num_pages = max(need.least(options) for need in needs) + spare
    passes = Passes(use_tree_attention(hesitant), options=options, shape=cache_shape(hesitant), num_pages=num_pages)
    searches = [
        Search(d.id, d.prompt_ids, d.tools, tokenizer, options, stop, need.capacity(num_pages, options))
        for d, need in zip(decisions, needs, strict=True)
    ]
    done = []
    for search in Engine(passes, options=options, report=SamplingReport()).run(searches):
        assert passes.pool.num_used <= num_pages
        done += [] if search is None else [search]
    assert set(done) == set(searches)
    assert passes.pool.num_used == 0
    if options.max_depth == 1:
        found = [[(path.name, path.decoded.ids) for path in search.paths] for search in searches]
        expected = written(hesitant, tokenizer, decisions, options)
        assert found == [[(name, decoded.ids) for name, decoded in tree] for tree in expected]
    else:
        assert any(search.dropped["pages"] for search in searches) == (spare < 90)


def test_prompts_that_begin_alike_are_computed_once(hesitant, tokenizer, decisions):
    report = SamplingReport()
    written(hesitant, tokenizer, decisions, LOOSE, report)
    prompts = [decision.prompt_ids[:-1] for decision in decisions]
    assert report.prefilled_tokens + report.shared_prompt_tokens == sum(map(len, prompts))
    new = []
    for i, ids in enumerate(prompts):
        common = [
            next((n for n, (a, b) in enumerate(zip(ids, o, strict=False)) if a != b), min(len(ids), len(o)))
            for o in prompts[:i]
        ]
        longest = max(common, default=0)
        new.append(len(ids) - (longest if longest >= MIN_SHARED else 0))
    assert report.prefilled_tokens == sum(new) < sum(map(len, prompts)) / 2


def test_tokens_are_counted_once(hesitant, tokenizer, decisions):
    report = SamplingReport()
    trees = written(hesitant, tokenizer, decisions, LOOSE, report)
    own = 0
    for tree in trees:
        for name, decoded in tree:
            at = int(name.rsplit("/", 1)[1].split(":")[0]) + 1 if "/" in name else 0
            own += len(decoded.ids) - at
    assert report.decoded_tokens == own
    assert 0 < report.accepted_tokens <= report.verified_tokens
    serial = SamplingReport()
    written(hesitant, tokenizer, decisions, dataclasses.replace(LOOSE, draft=False, rows=1), serial)
    assert (serial.decoded_tokens, serial.verified_tokens, serial.passes) == (own, 0, own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dataclasses.replace(LOOSE, max_tree_pages=4), "'right:1' has a prompt of .* max_tree_pages is 4: raise it"),
        (
            dataclasses.replace(LOOSE, cache_gb=1e-5),
            "'right:1' has a prompt of .* the cache has .*: give cache_gb of at",
        ),
    ],
)
def test_a_tree_that_cannot_be_held_is_refused_before_any_work(hesitant, tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        sample_trees(hesitant, tokenizer, [asking("right", "Rome")], options=options)


def test_the_model_keeps_its_mode(hesitant, tokenizer, decisions):
    hesitant.train()
    try:
        written(hesitant, tokenizer, decisions[:1], LOOSE)
        assert hesitant.training
    finally:
        hesitant.eval()


def test_a_writer_that_was_left_early_begins_anew(hesitant, tokenizer, decisions):
    writer = PathWriter(hesitant, tokenizer, decisions, options=LOOSE)
    for _ in writer.write(decisions, report=SamplingReport()):
        assert writer.passes.pool.num_used > 0
        break
    found = dict(writer.write(decisions, report=SamplingReport()))
    assert tokens([found[i] for i in range(len(decisions))]) == tokens(written(hesitant, tokenizer, decisions, LOOSE))
    assert writer.passes.pool.num_used == 0
