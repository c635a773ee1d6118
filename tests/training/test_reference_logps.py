"""Reference log-probabilities: cached, recorded by the sampler, moving with the policy."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_trees import random_tree
from ranks import run_ranks
from safetensors.numpy import load_file

from ttpa.errors import InputError
from ttpa.hashes import hash_of_model
from ttpa.model import packed_logps, use_tree_attention
from ttpa.training.distributed import make_mesh, shard_policy
from ttpa.training.policy import Policy
from ttpa.training.reference import MovingReference, check_sampled, fill, logps_of, sampled_logps, token_scores
from ttpa.training.reference_cache import ReferenceCache, content_key, model_key
from ttpa.trees.pack import completion_tokens
from ttpa.trees.record import Leaf, Pair
from ttpa.world import World, joined_world

TREES = [random_tree(seed, tools=seed % 2 == 0) for seed in range(8)]
PACK_TOKENS = 60


@pytest.fixture
def model(tiny_model):
    return use_tree_attention(tiny_model)


class Counted:
    """Log-probabilities of a model, and how many packs were computed; the process ends in the middle of pack `last`."""

    def __init__(self, model, last=None):
        self.model, self.calls, self.last = model, 0, last

    def __call__(self, pack):
        if self.calls == self.last:
            raise KeyboardInterrupt
        self.calls += 1
        return packed_logps(self.model, pack)


def filled(folder, compute, trees=TREES, *, pack_tokens=PACK_TOKENS, **options):
    cache = ReferenceCache(folder, model_key="m")
    return cache, fill(cache, trees, compute=compute, pack_tokens=pack_tokens, **options)


def plain_logps(model, tree):
    """What a plain forward of every completion gives to its tokens, NaN where the model did not write or no pair is."""
    found = [np.full(len(node.ids), np.nan) for node in tree.nodes]
    for leaf in {leaf for pair in tree.pairs for leaf in (pair.chosen, pair.rejected)}:
        ids = torch.tensor([tree.prompt_ids + tree.completion_ids(leaf)])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(tree.prompt_ids) - 1 : -1].double()
        logps = logits.log_softmax(dim=-1).gather(1, ids[0, len(tree.prompt_ids) :, None])[:, 0].numpy()
        logps[np.array(tree.trained(leaf)) == 0] = np.nan
        at = 0
        for n in tree.path(leaf):
            found[n] = logps[at : at + len(found[n])]
            at += len(found[n])
    return np.concatenate(found)


@pytest.mark.parametrize("pack_tokens", [1, 30, 10_000])
def test_values_are_those_of_a_plain_forward_however_trees_are_packed_and_cut(model, tmp_path, pack_tokens):
    tree = replace(TREES[1], pairs=[Pair(2, 0), Pair(1, 1)])
    trees = [replace(TREES[2], pairs=TREES[2].pairs[:1]), *TREES[3:], tree, random_tree(20, num_leaves=3)]
    cache, done = filled(tmp_path, Counted(model), trees, pack_tokens=pack_tokens)
    assert (done.hits, done.computed, done.broken) == (0, 8, ())
    for tree in trees:
        np.testing.assert_allclose(logps_of(tree, cache), plain_logps(model, tree), atol=5e-6, equal_nan=True)
    assert np.isnan(logps_of(trees[0], cache)).sum() > 0


def test_what_is_known_is_not_computed_again_whatever_else_changes(model, tmp_path):
    cache, done = filled(tmp_path, Counted(model))
    assert done.computed == len(TREES)
    # other pairs of the same leaves, other margins, scores, ids, order, and another length of packs
    others = [
        replace(
            tree,
            id=f"other {tree.id}",
            pairs=[Pair(pair.rejected, pair.chosen, 9.0) for pair in tree.pairs[1:]],
            leaves=[replace(leaf, score=0.5) for leaf in tree.leaves],
        )
        for tree in reversed(TREES)
    ]
    compute = Counted(model)
    again, done = filled(tmp_path, compute, [*others, *TREES], pack_tokens=40)
    assert (compute.calls, done.hits, done.computed) == (0, len(TREES), 0)
    for tree in TREES:
        assert logps_of(tree, again).tobytes() == logps_of(tree, cache).tobytes()


def test_changed_tokens_are_computed_and_the_rest_is_not(model, tmp_path):
    filled(tmp_path, Counted(model))
    first = TREES[0].nodes[0]
    changed = replace(TREES[0], nodes=[replace(first, ids=[first.ids[0] + 1, *first.ids[1:]]), *TREES[0].nodes[1:]])
    compute = Counted(model)
    cache, done = filled(tmp_path, compute, [changed, *TREES])
    assert (compute.calls, done.hits, done.computed) == (1, len(TREES), 1)
    np.testing.assert_allclose(logps_of(changed, cache), plain_logps(model, changed), atol=5e-6, equal_nan=True)


def test_new_pairs_of_a_known_tree_are_computed_and_its_old_values_stay(model, tmp_path):
    tree = random_tree(3, num_leaves=5)
    cache, _ = filled(tmp_path, Counted(model), [replace(tree, pairs=[Pair(0, 1)])])
    old = cache.get(tree)
    assert 0 < np.isnan(old).sum() < len(old)
    cache, done = filled(tmp_path, Counted(model), [replace(tree, pairs=[Pair(0, i)]) for i in (2, 3, 4)])
    assert done.computed == 1
    new = logps_of(replace(tree, pairs=[Pair(i, 0) for i in range(1, 5)]), cache)
    assert new[~np.isnan(old)].tobytes() == old[~np.isnan(old)].tobytes()
    np.testing.assert_allclose(
        new, plain_logps(model, replace(tree, pairs=[Pair(0, i) for i in range(1, 5)])), atol=5e-6
    )


def test_a_token_is_stored_once_however_a_tree_is_cut(model, tmp_path):
    cache, _ = filled(tmp_path, Counted(model), pack_tokens=1, save_seconds=0.0)
    stored = np.concatenate([load_file(path)["logps"] for path in cache.folder.iterdir()])
    assert np.isfinite(stored).sum() == sum(np.isfinite(plain_logps(model, tree)).sum() for tree in TREES)


def test_another_model_finds_nothing(model, tokenizer, tmp_path):
    with torch.no_grad():
        other = copy.deepcopy(model)
        other.model.norm.weight *= 1.5
    for number, each in enumerate((model, other)):
        cache = ReferenceCache(tmp_path, model_key=model_key(each, tokenizer, dtype=torch.float32))
        assert fill(cache, TREES, compute=Counted(each), pack_tokens=PACK_TOKENS).computed == len(TREES), number
        for tree in TREES:
            np.testing.assert_allclose(logps_of(tree, cache), plain_logps(each, tree), atol=5e-6, equal_nan=True)


@pytest.mark.parametrize("last", [0, 1, 3])
def test_an_interruption_loses_what_was_not_written_and_ends_with_the_same_bits(model, tmp_path, last):
    whole, _ = filled(tmp_path / "whole", Counted(model))
    seen = []
    with pytest.raises(KeyboardInterrupt):
        filled(
            tmp_path / "cut",
            Counted(model, last=last),
            save_seconds=0.0,
            progress=lambda done, total: seen.append((done, total)),
        )
    compute = Counted(model)
    cache, _ = filled(tmp_path / "cut", compute)
    assert [done for done, _ in seen] == list(range(1, last + 1))
    assert compute.calls + last == (seen[-1][1] if seen else compute.calls) and compute.calls > 0
    for tree in TREES:
        assert logps_of(tree, cache).tobytes() == logps_of(tree, whole).tobytes()


@pytest.mark.parametrize("pack_tokens", [30, 60])
def test_whatever_packs_are_lost_come_back_as_they_were(model, tmp_path, pack_tokens):
    cache, _ = filled(tmp_path, Counted(model), pack_tokens=pack_tokens, save_seconds=0.0)
    shards = sorted(cache.folder.iterdir())  # one for each pack, named by its content
    for seed in range(4):
        for path in random.Random(seed).sample(shards, len(shards) // 2):
            path.unlink()
        filled(tmp_path, Counted(model), pack_tokens=pack_tokens, save_seconds=0.0)
        assert sorted(cache.folder.iterdir()) == shards


def test_a_broken_shard_is_named_and_what_it_held_is_computed_again(model, tmp_path):
    compute = Counted(model)
    cache, _ = filled(tmp_path, compute, save_seconds=0.0)
    shards = sorted(cache.folder.iterdir())
    assert len(shards) == compute.calls > 2
    shards[1].write_bytes(shards[1].read_bytes()[:-3])
    compute = Counted(model)
    again, done = filled(tmp_path, compute)
    assert compute.calls == 1 and [report.partition(":")[0] for report in done.broken] == [str(shards[1])]
    for tree in TREES:
        assert logps_of(tree, again).tobytes() == logps_of(tree, cache).tobytes()
    assert filled(tmp_path, Counted(model, last=0))[1].broken == ()


def test_a_value_that_is_not_finite_is_refused_with_the_tree(model, tmp_path):
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(InputError, match=r"a token of tree 'tree\d' a log-probability that is not finite"):
        filled(tmp_path, Counted(model))


def test_scores_are_differences_and_unknown_where_one_is(model):
    scores = token_scores(np.array([-1, -2, np.nan], np.float32), np.array([-3, np.nan, np.nan], np.float32))
    assert scores.dtype == np.float32 and scores[0] == 2 and np.isnan(scores[1:]).all()


def sampled_by(model, tree, *, skip=()):
    """The tree as a sampler would have written it; of the nodes in `skip` nothing was recorded."""
    whole = replace(
        tree,
        leaves=[Leaf(n, "given") for n in range(len(tree.nodes))],
        pairs=[Pair(n, n) for n in range(len(tree.nodes))],
        nodes=[replace(node, trained=None) for node in tree.nodes],
    )
    logps = np.split(plain_logps(model, whole), np.cumsum([len(node.ids) for node in tree.nodes]))
    nodes = [replace(node, logps=None if n in skip else logps[n].tolist()) for n, node in enumerate(tree.nodes)]
    return replace(tree, nodes=nodes)


def test_log_probabilities_of_the_sampler_take_the_place_of_computed_ones(model, tmp_path):
    trees = [sampled_by(model, tree, skip=[len(tree.nodes) - 1] if t == 2 else ()) for t, tree in enumerate(TREES)]
    agreement = check_sampled(trees, compute=Counted(model), pack_tokens=PACK_TOKENS, dtype=torch.float32)
    assert agreement.largest < 1e-5 and agreement.tokens > 50
    compute = Counted(model)
    cache, done = filled(tmp_path, compute, trees, sampled=True)
    assert (done.hits, done.computed, compute.calls) == (len(trees) - 1, 1, 1)
    for t, tree in enumerate(trees):
        recorded, found = sampled_logps(tree), logps_of(tree, cache, sampled=True)
        assert np.isnan(recorded).sum() == (len(tree.nodes[-1].ids) if t == 2 else 0)
        assert np.array_equal(found[~np.isnan(recorded)], recorded[~np.isnan(recorded)])
        expected = plain_logps(model, tree)
        np.testing.assert_allclose(found[~np.isnan(expected)], expected[~np.isnan(expected)], atol=5e-6)


def test_log_probabilities_of_another_model_are_refused_with_numbers(model):
    trees = [sampled_by(model, tree) for tree in TREES]
    last = trees[5].nodes[trees[5].leaves[0].node]
    last.trained, last.logps[-1] = None, last.logps[-1] - 0.002
    with pytest.raises(
        InputError, match=r"on average and by 0\.002 at most, in tree 'tree5'; 0\.001 and 0\.001 are al"
    ):
        check_sampled(trees, compute=Counted(model), pack_tokens=PACK_TOKENS, dtype=torch.float32)
    check_sampled(trees, compute=Counted(model), pack_tokens=PACK_TOKENS, dtype=torch.bfloat16)
    compute = Counted(model)
    check_sampled(trees[:5], compute=compute, pack_tokens=40, dtype=torch.float32, num_packs=3)
    assert compute.calls == 3
    other = [replace(tree, nodes=[replace(n, logps=[p - 0.1 for p in n.logps]) for n in tree.nodes]) for tree in trees]
    with pytest.raises(InputError, match=r"by 0\.1 nats on average"):
        check_sampled(other, compute=Counted(model), pack_tokens=PACK_TOKENS, dtype=torch.bfloat16)


def test_trees_that_nobody_sampled_are_refused(model):
    with pytest.raises(InputError, match=r"no tree has log-probabilities .* \(the first is 'tree0'\)"):
        check_sampled(TREES, compute=Counted(model), pack_tokens=PACK_TOKENS, dtype=torch.float32)


def weights_of(policy):
    return {name: weight.detach().clone() for name, weight in policy.named_parameters()}


def step(policy, size=0.1):
    with torch.no_grad():
        for weight in policy.parameters():
            weight += size * torch.randn_like(weight)


def test_a_moving_reference_is_the_mean_that_its_equation_says(model):
    model.model.norm.requires_grad_(False)
    start = weights_of(model)
    reference = MovingReference(model, alpha=0.25, steps=2)
    assert reference.state().keys() == start.keys() - {"model.norm.weight"}
    expected = {name: start[name].double() for name in reference.state()}
    for number in range(1, 6):
        step(model)
        reference.after_step(number)
        if number % 2 == 0:
            expected = {n: 0.25 * weights_of(model)[n].double() + 0.75 * copy for n, copy in expected.items()}
        for name, weight in reference.state().items():
            torch.testing.assert_close(weight.double(), expected[name], rtol=0, atol=1e-6)


def test_weights_are_exchanged_for_a_while_and_come_back_to_the_bit_whatever_happens(model):
    start = weights_of(model)
    reference = MovingReference(model, alpha=0.5, steps=1)
    step(model)
    with torch.no_grad():
        model.model.norm.weight[0] = -0.0
    now = weights_of(model)
    for error in (None, KeyError):
        try:
            with reference.swapped():
                assert all(torch.equal(weight, start[name]) for name, weight in model.named_parameters())
                if error:
                    raise error
        except KeyError:
            pass
        for name, weight in model.named_parameters():
            assert torch.equal(weight.detach().view(torch.int32), now[name].view(torch.int32))
        assert all(torch.equal(weight, start[name]) for name, weight in reference.state().items())


def test_a_failure_in_the_middle_of_the_exchange_leaves_the_weights_as_they_were(model, monkeypatch):
    reference = MovingReference(model, alpha=0.5, steps=1)
    step(model)
    now, copies = weights_of(model), {name: copy.clone() for name, copy in reference.state().items()}
    exchange, left = MovingReference._exchange, iter(range(3))

    def out_of_memory(self, name):
        if next(left, None) is None:
            monkeypatch.setattr(MovingReference, "_exchange", exchange)
            raise torch.OutOfMemoryError
        exchange(self, name)

    monkeypatch.setattr(MovingReference, "_exchange", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError), reference.swapped():
        pass
    assert all(torch.equal(weight, now[name]) for name, weight in model.named_parameters())
    assert all(torch.equal(copy, copies[name]) for name, copy in reference.state().items())


def test_weights_cast_by_autocast_are_exchanged_too(model):
    # autocast keeps the casted weights of a block of code, those of the policy here
    ids = torch.tensor([[5, 6, 7, 8]])
    reference = MovingReference(model, alpha=0.5, steps=1)
    before = model(input_ids=ids).logits
    step(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(input_ids=ids).logits
        with reference.swapped(), torch.no_grad():
            theirs = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, ours)
    assert (theirs - before).abs().max() < 0.05 < (ours - theirs).abs().max()


def test_the_state_of_a_moving_reference_comes_back(model):
    reference = MovingReference(model, alpha=0.5, steps=1)
    step(model)
    reference.after_step(1)
    saved = {name: weight.clone() for name, weight in reference.state().items()}
    other = MovingReference(model, alpha=0.5, steps=1)
    other.load_state(saved)
    assert all(torch.equal(weight, saved[name]) for name, weight in other.state().items())
    saved.pop("model.norm.weight")
    with pytest.raises(InputError, match="of another model or of other trained weights"):
        other.load_state(saved)


@pytest.mark.parametrize(
    ("name", "values"), [("mixup_alpha", (0.0, 1)), ("mixup_alpha", (1.5, 1)), ("sync_steps", (0.6, 0))]
)
def test_a_reference_that_cannot_move_is_refused(model, name, values):
    with pytest.raises(InputError, match=f"--ref_model_{name} must"):
        MovingReference(model, alpha=values[0], steps=values[1])


def in_two_processes(folder, model, model_hash, expected):
    """All that two processes do together, in one start of them."""
    with joined_world() as world:
        compute, trees = Counted(model), TREES[:7]
        cache = ReferenceCache(folder / "new", model_key="m")
        fill(cache, trees, compute=compute, pack_tokens=PACK_TOKENS, world=world, save_seconds=0.0)
        # the packs are odd in number: one process computes its last one for the sake of the other
        assert {len(list(cache.folder.glob(f"0000{rank}-*"))) for rank in range(2)} == {
            compute.calls,
            compute.calls - 1,
        }
        for tree in trees:
            assert logps_of(tree, cache).tobytes() == expected[content_key(tree)].tobytes()
        assert fill(cache, trees, compute=compute, pack_tokens=PACK_TOKENS, world=world).computed == 0

        apart = ReferenceCache(folder / str(world.rank), model_key="m")
        with pytest.raises(InputError, match="a folder that all nodes share"):
            fill(apart, trees[: 1 + world.rank], compute=compute, pack_tokens=PACK_TOKENS, world=world)
        with pytest.raises(InputError, match="a folder that all nodes share"):
            fill(apart, trees, compute=compute, pack_tokens=PACK_TOKENS, world=world)

        policy, few = Policy(model), trees[:3]
        shard_policy(policy, policy.blocks, mesh=make_mesh(world, shard_size=None), bf16=False)
        assert hash_of_model(model) == model_hash
        again = filled_with(policy, folder / "sharded", world, few)
        for tree in few:
            found, single = logps_of(tree, again), expected[content_key(tree)]
            np.testing.assert_allclose(found, single, atol=5e-6, equal_nan=True)

        reference = MovingReference(policy, alpha=0.5, steps=1)
        whole = {name: weight.full_tensor() for name, weight in reference.state().items()}
        torch.manual_seed(world.rank)
        step(policy)
        moved = logps_of(few[0], filled_with(policy, folder / "moved", world, few))
        with reference.swapped():
            held = logps_of(few[0], filled_with(policy, folder / "held", world, few))
        back = logps_of(few[0], filled_with(policy, folder / "back", world, few))
        assert np.nanmax(np.abs(moved - expected[content_key(few[0])])) > 0.01
        assert held.tobytes() == logps_of(few[0], again).tobytes() and back.tobytes() == moved.tobytes()
        reference.after_step(1)
        reference.load_state(whole)
        assert all(torch.equal(weight.full_tensor(), whole[name]) for name, weight in reference.state().items())


def filled_with(policy, folder, world: World, trees):
    def compute(pack):
        return policy(lambda model: (packed_logps(model, pack),))[0]  # leaves the root's weights gathered

    cache = ReferenceCache(folder, model_key="m")
    fill(cache, trees, compute=compute, pack_tokens=PACK_TOKENS, world=world)
    return cache


def test_two_processes_share_the_work_and_find_the_values_of_one(model, tmp_path):
    cache, _ = filled(tmp_path / "one", Counted(model), TREES[:7])
    expected = {content_key(tree): logps_of(tree, cache) for tree in TREES[:7]}
    assert all(len(logps) == completion_tokens(tree) for logps, tree in zip(expected.values(), TREES, strict=False))
    run_ranks(in_two_processes, 2, tmp_path, model, hash_of_model(model), expected)
