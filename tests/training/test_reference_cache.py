"""A cache gives back what was written for the same content, and nothing else."""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_trees import random_tree

from ttpa.errors import InputError
from ttpa.training.reference_cache import ReferenceCache, content_key, model_key
from ttpa.trees.pack import completion_tokens
from ttpa.trees.record import Node

TREES = [random_tree(seed, tools=seed % 2 == 0) for seed in range(6)]


def values(tree, seed=0):
    return np.random.default_rng(seed).normal(size=completion_tokens(tree)).astype(np.float32)


def test_any_number_of_shards_and_processes_make_one_cache(tmp_path):
    first, second = (ReferenceCache(tmp_path, model_key="m") for _ in range(2))
    first.write({content_key(tree): values(tree) for tree in TREES[:4]}, rank=0)
    second.write({content_key(tree): values(tree) for tree in TREES[4:]}, rank=1)
    assert len(list((tmp_path / "m").iterdir())) == 2
    assert np.isnan(first.get(TREES[5])).all()
    first.refresh()
    for cache in (first, ReferenceCache(tmp_path, model_key="m")):
        for tree in TREES:
            assert cache.get(tree).tobytes() == values(tree).tobytes()


def test_what_is_unknown_is_nan_and_shards_complete_each_other(tmp_path):
    cache, tree = ReferenceCache(tmp_path, model_key="m"), TREES[0]
    whole = values(tree)
    for half in (np.arange(len(whole)) % 2 == 0, np.arange(len(whole)) % 2 == 1):
        cache.write({content_key(tree): np.where(half, whole, np.nan).astype(np.float32)}, rank=0)
        cache.refresh()
        assert cache.get(tree)[half].tobytes() == whole[half].tobytes()
    assert cache.get(tree).tobytes() == whole.tobytes()


def test_every_change_of_content_is_another_key_and_what_is_no_content_is_not():
    tree = random_tree(1)
    tree.nodes[0].trained = None
    n = next(n for n, node in enumerate(tree.nodes) if n and len(node.ids) > 1)
    ids = tree.nodes[n].ids

    def with_node(n, **changes):
        return replace(tree, nodes=[*tree.nodes[:n], replace(tree.nodes[n], **changes), *tree.nodes[n + 1 :]])

    others = [
        replace(tree, prompt_ids=[*tree.prompt_ids, 7]),
        replace(tree, prompt_ids=[*tree.prompt_ids[:-1], tree.prompt_ids[-1] + 1]),
        replace(tree, prompt_ids=[*tree.prompt_ids, tree.nodes[0].ids[0]], nodes=[replace(tree.nodes[0], ids=[0])]),
        with_node(n, ids=[ids[0] + 1, *ids[1:]]),
        with_node(n, ids=ids[:-1]),
        with_node(n, parent=-1),
        with_node(n, trained=[0] + [1] * (len(ids) - 1)),
        replace(tree, nodes=[*tree.nodes, Node(-1, [5])]),
        replace(tree, nodes=tree.nodes[:-1]),
    ]
    keys = [content_key(other) for other in (tree, *others)]
    assert len(set(keys)) == len(keys)
    same = [
        replace(tree, id="x", pairs=tree.pairs[:1], leaves=tree.leaves[:2], dialogue="d", origin={"seed": 1}),
        with_node(n, trained=[1] * len(ids), logps=[-1.0] * len(ids), entropy=[0.5] * len(ids)),
    ]
    assert {content_key(other) for other in same} == {content_key(tree)}


def test_the_key_of_a_model_changes_with_weights_config_template_and_dtype(tiny_model, tokenizer):
    known = model_key(tiny_model, tokenizer, dtype=torch.float32)
    assert model_key(copy.deepcopy(tiny_model), copy.deepcopy(tokenizer), dtype=torch.float32) == known
    heavier, wider, template = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model), copy.deepcopy(tokenizer)
    with torch.no_grad():
        heavier.model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-7
    wider.config.rope_parameters = {"rope_type": "default", "rope_theta": 5.0}
    template.chat_template += " "
    others = [
        model_key(heavier, tokenizer, dtype=torch.float32),
        model_key(wider, tokenizer, dtype=torch.float32),
        model_key(tiny_model, template, dtype=torch.float32),
        model_key(tiny_model, tokenizer, dtype=torch.bfloat16),
    ]
    assert len({known, *others}) == 5


def test_models_have_folders_of_their_own_and_one_in_the_wrong_place_is_named(tmp_path):
    key = content_key(TREES[0])
    path = ReferenceCache(tmp_path, model_key="one").write({key: values(TREES[0])}, rank=0)
    assert np.isnan(ReferenceCache(tmp_path, model_key="two").get(TREES[0])).all()
    (tmp_path / "one").rename(tmp_path / "two")
    with pytest.raises(InputError, match=rf"two/{path.name}: holds log-probabilities of another model \(one, "):
        ReferenceCache(tmp_path, model_key="two")


def test_a_shard_with_any_bit_turned_is_known_as_broken_or_gives_the_same(tmp_path):
    path = ReferenceCache(tmp_path, model_key="m").write({content_key(TREES[0]): values(TREES[0])}, rank=0)
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 7):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        cache = ReferenceCache(tmp_path, model_key="m")
        if list(cache.broken) == [path]:
            assert np.isnan(cache.get(TREES[0])).all()
        else:
            assert cache.get(TREES[0]).tobytes() == values(TREES[0]).tobytes()  # a blank of the header


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_shard_that_was_cut_off_is_named_and_can_be_written_again(tmp_path, share):
    record = {content_key(TREES[0]): values(TREES[0])}
    cache = ReferenceCache(tmp_path, model_key="m")
    path, other = cache.write(record, rank=0), cache.write({content_key(TREES[1]): values(TREES[1])}, rank=0)
    os.truncate(path, int(share * path.stat().st_size))
    cache.refresh()
    assert list(cache.broken) == [path] and cache.broken[path]
    assert np.isnan(cache.get(TREES[0])).all() and not np.isnan(cache.get(TREES[1])).any()
    cache.forget_broken(delete=True)
    assert not path.exists() and other.exists()
    assert cache.write(record, rank=0) == path
    cache.refresh()
    assert not cache.broken and cache.get(TREES[0]).tobytes() == values(TREES[0]).tobytes()


def test_what_killed_processes_left_goes_and_what_others_are_writing_stays(tmp_path):
    cache = ReferenceCache(tmp_path, model_key="m")
    cache.folder.mkdir()
    old, new = cache.folder / ".00000-a.safetensors.1.tmp", cache.folder / ".00001-b.safetensors.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.refresh()
    assert not cache.broken
    cache.forget_broken(delete=False)
    assert old.exists()
    cache.forget_broken(delete=True)
    assert not old.exists() and new.exists()


def test_a_place_that_cannot_be_written_or_read(tmp_path):
    (tmp_path / "file").write_text("")
    cache = ReferenceCache(tmp_path / "file", model_key="m")
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        cache.write({content_key(TREES[0]): values(TREES[0])}, rank=0)
    (tmp_path / "m" / "a.safetensors").mkdir(parents=True)
    with pytest.raises(InputError, match="/m: cannot be read"):
        ReferenceCache(tmp_path, model_key="m")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_the_cache_readable_and_no_half_file(tmp_path):
    cache = ReferenceCache(tmp_path, model_key="m")
    known, new = ({content_key(tree): values(tree)} for tree in TREES[:2])
    path, name = cache.write(known, rank=0), cache.write(new, rank=3).name
    (cache.folder / name).unlink()
    (cache.folder / f".{name}.{os.getpid()}.tmp").symlink_to("/dev/full")  # where it will be written first
    with pytest.raises(InputError, match="cannot be written: No space left on device; what the cache held"):
        cache.write(new, rank=3)
    assert list(cache.folder.iterdir()) == [path]
    cache.refresh()
    assert cache.get(TREES[0]).tobytes() == values(TREES[0]).tobytes()
