"""The engine of a GPU writes what that of a CPU writes, though it looks at every step one step late."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hesitant import asking

from ttpa.data.decisions import Decision, all_decisions
from ttpa.model import use_tree_attention
from ttpa.sampling import SamplingOptions, SamplingReport
from ttpa.sampling.engine import Engine, Need
from ttpa.sampling.graph import DecodeStep, GraphEngine, Ticket, packed
from ttpa.sampling.head import pick
from ttpa.sampling.passes import Passes, cache_shape
from ttpa.sampling.search import Search
from ttpa.sampling.stop import Stop, end_ids

pytestmark = pytest.mark.triton

SHORT = SamplingOptions(
    min_entropy=0.001, min_probability=1e-4, min_ratio=1e-4, num_forks=2, max_leaves=5, max_new_tokens=36, rows=3
)
DRAWN = SamplingOptions(mode="release", num_samples=3, max_new_tokens=9, rows=4)


def searched(engine, searches):
    done = [search for search in engine.run(searches) if search is not None]
    assert set(done) == set(searches)
    return [[(path.name, path.decoded) for path in search.paths] for search in searches]


def searches_of(model, tokenizer, decisions, options, num_pages):
    stop = Stop(tokenizer, end_ids(model, tokenizer), options.stop)
    needs = [Need.of(len(d.prompt_ids), options) for d in decisions]
    return [
        Search(d.id, d.prompt_ids, d.tools, tokenizer, options, stop, need.capacity(num_pages, options))
        for d, need in zip(decisions, needs, strict=True)
    ]


def compare(model, tokenizer, decisions, options):
    num_pages, found = 200, []
    longest = max(len(d.prompt_ids) for d in decisions) + options.max_new_tokens
    for late in (False, True):
        passes = Passes(model, options=options, shape=cache_shape(model), num_pages=num_pages)
        engine = Engine(passes, options=options, report=SamplingReport())
        if late:
            step = DecodeStep(passes, rows=options.rows, max_positions=longest)
            engine = GraphEngine(passes, options=options, report=SamplingReport(), step=step)
        found.append(searched(engine, searches_of(model, tokenizer, decisions, options, num_pages)))
        assert passes.pool.num_used == 0
    for ours, theirs in zip(*found, strict=True):
        assert [(n, d.ids, d.finish) for n, d in ours] == [(n, d.ids, d.finish) for n, d in theirs]
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)
            np.testing.assert_allclose(a.varentropy, b.varentropy, atol=1e-4)
            np.testing.assert_allclose(a.top_probabilities, b.top_probabilities, atol=1e-5)
    return found[0]


def test_forks_equal_those_of_the_engine_of_a_cpu(hesitant, tokenizer, device):
    model = use_tree_attention(copy.deepcopy(hesitant)).to(device)
    (tree,) = compare(model, tokenizer, all_decisions([asking("right", "Rome")], tokenizer), SHORT)
    assert len(tree) > 2


def test_rows_come_and_go_as_in_the_engine_of_a_cpu(tiny_model, tokenizer, device):
    """More samples than rows, which end at different steps."""
    tiny_model.model.norm.weight.data.mul_(6.0)
    model = use_tree_attention(tiny_model).to(device)
    prompts = [[5, 6, 7], list(range(40, 60)), [9] * 17]
    decisions = [Decision(f"d{i}", 0, [], [], [], ids, [], {}) for i, ids in enumerate(prompts)]
    trees = compare(model, tokenizer, decisions, DRAWN)
    assert len({tuple(decoded.ids) for tree in trees for _, decoded in tree}) > 3


def test_results_survive_the_way_to_the_host():
    torch.manual_seed(0)
    picked = pick(torch.randn(3, 8), torch.randn(300, 8), num_top=5)
    for i, (decoded, complete) in enumerate(Ticket(packed(picked), None).rows()):
        assert decoded.ids == [int(picked.token_B[i])] and complete.tolist() == [True]
        for name in ("logp", "entropy", "varentropy"):
            ours = getattr(decoded, name if name != "logp" else "logps")
            assert ours == [float(getattr(picked, f"{name}_B")[i])]
        assert decoded.top_ids.tolist() == picked.top_id_BK[i : i + 1].tolist()
        assert decoded.top_probabilities.tolist() == picked.top_p_BK[i : i + 1].tolist()
