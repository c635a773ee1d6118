from __future__ import annotations

import os
import re
import resource
import signal

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor

from ttpa.errors import InputError
from ttpa.training.checkpoint import Checkpoints
from ttpa.training.distributed import make_mesh, shard_policy
from ttpa.training.stop import StopSignal
from ttpa.world import World, joined_world


class Sharded(nn.Module):
    """Sizes that two processes cannot halve, one of which leaves nothing for the second, and a tied head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 3)
        self.blocks = nn.ModuleList([nn.Linear(3, 1), nn.Linear(1, 5), nn.Linear(5, 3)])
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def make(world, *, shard_size=None):
    policy = Sharded()
    if world.size > 1:
        shard_policy(policy, list(policy.blocks), mesh=make_mesh(world, shard_size=shard_size), bf16=False)
    return policy, torch.optim.AdamW(policy.parameters(), lr=1e-2, fused=True)


def train(policy, optimizer, world, steps):
    for _ in range(steps):
        ids = (torch.arange(6) + world.rank) % 7
        policy(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def checkpoints_in(folder, world, **kept):
    return Checkpoints(folder, world=world, fingerprint={"data": "5fe1"}, **kept)


def values_of(policy, optimizer):
    """Parameters and optimizer states, whole."""
    tensors = {name: p.detach() for name, p in policy.named_parameters()}
    for name, parameter in policy.named_parameters():
        tensors |= {f"{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}


def assert_equal(found, expected):
    assert len(found) == 7 * 4
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].equal(expected[name]), name


LAYOUTS = {"sharded": None, "replicated": 1}  # the number of processes that share the weights; None is all


def break_and_go_on(folder, shard_size):
    with joined_world() as world:
        policy, optimizer = make(world, shard_size=shard_size)
        start = checkpoints_in(folder / "start", world)
        path = start.save(0, policy=policy, optimizer=optimizer, state={})
        train(policy, optimizer, world, 2)
        with torch.no_grad():
            policy(torch.arange(3))  # a pass without gradients leaves the root's weights gathered
        checkpoints_in(folder / "two", world).save(2, policy=policy, optimizer=optimizer, state={})
        after_two = values_of(policy, optimizer)
        train(policy, optimizer, world, 1)
        after_three = values_of(policy, optimizer)

        start.load(path, policy=policy, optimizer=optimizer)
        assert not optimizer.state
        train(policy, optimizer, world, 2)
        assert_equal(values_of(policy, optimizer), after_two)

        if world.main:  # one process that needs no other
            alone, alone_optimizer = make(World())
            two = checkpoints_in(folder / "two", World())
            two.load(two.latest(), policy=alone, optimizer=alone_optimizer)
            assert_equal(values_of(alone, alone_optimizer), after_two)
            one = checkpoints_in(folder / "one", World())
            one.save(2, policy=alone, optimizer=alone_optimizer, state={})
        world.barrier()

        policy, optimizer = make(world, shard_size=shard_size)
        one = checkpoints_in(folder / "one", world)
        one.load(one.latest(), policy=policy, optimizer=optimizer)
        train(policy, optimizer, world, 1)
        assert_equal(values_of(policy, optimizer), after_three)


def go_on_in_all_layouts(folder):
    break_and_go_on(folder / "sharded", None)
    break_and_go_on(folder / "replicated", 1)


def test_a_run_goes_on_exactly_over_two_processes_one_and_two(tmp_path):
    run_ranks(go_on_in_all_layouts, 2, tmp_path)


def meet_trouble(folder):
    with joined_world() as world:
        policy, optimizer = make(world)
        train(policy, optimizer, world, 1)
        checkpoints = checkpoints_in(folder, world, keep_last=3)
        whole = checkpoints.save(1, policy=policy, optimizer=optimizer, state={})

        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        with pytest.raises(InputError, match="File too large" if world.rank == 1 else "another process says why"):
            checkpoints.save(2, policy=policy, optimizer=optimizer, state={})
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert os.listdir(folder) == [whole.name]

        broken = checkpoints.save(2, policy=policy, optimizer=optimizer, state={})
        if world.main:
            (broken / "rank-00001-000.safetensors").write_bytes(b"")
        world.barrier()
        message = f"{broken}: rank-00001-000.safetensors: missing, cut off or corrupt"
        if world.main:
            with pytest.warns(UserWarning, match=re.escape(message)):
                assert checkpoints_in(folder, world).latest() == whole
        else:
            assert checkpoints_in(folder, world).latest() == whole
        with pytest.raises(InputError, match=re.escape(message)):
            checkpoints_in(folder, world).load(broken, policy=policy, optimizer=optimizer)

        with StopSignal() as stop:
            assert not world.any(stop.asked)
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            assert world.any(stop.asked)


def test_processes_agree_on_what_goes_wrong_in_one_of_them(tmp_path):
    run_ranks(meet_trouble, 2, tmp_path)
