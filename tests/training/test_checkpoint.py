from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from ttpa.errors import InputError
from ttpa.training import shards
from ttpa.training.checkpoint import Checkpoints
from ttpa.training.stop import StopSignal
from ttpa.world import World

FINGERPRINT = {"data": "5fe1", "loss_type": "ttpa", "beta": 0.1}


def checkpoints_in(folder, *, fingerprint=FINGERPRINT, device="cpu", **kept):
    world = World(device=torch.device(device))
    return Checkpoints(folder / "checkpoints", world=world, fingerprint=fingerprint, **kept)


class Small(nn.Module):
    """Tied and frozen weights, a bias, a number, bf16, a layout of its own, and both kinds of buffers."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(6, 5)
        self.base = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.body.weight
        self.scale = nn.Parameter(torch.rand(()))
        self.short = nn.Parameter(torch.rand(5, dtype=torch.bfloat16))
        self.turned = nn.Parameter(torch.rand(3, 5).t())
        self.register_buffer("seen", torch.rand(2))
        self.register_buffer("passing", torch.rand(2), persistent=False)

    def forward(self, x):
        hidden = self.base(torch.tanh(self.body(x))) * self.scale + self.short.float()
        self.seen += 1
        return (hidden @ self.turned).square().mean() + self.head(x).mean()


def optimizer_of(policy):
    """AdamW as the trainer makes it: two groups, all in one kernel."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, fused=True)


def train(policy, optimizer, steps):
    """Some steps whose data come from every random number generator; returns the loss of the last."""
    device = policy.scale.device
    for _ in range(steps):
        x = torch.randn(4, 6) + random.random() + float(np.random.rand())
        loss = policy(x.to(device) + torch.rand((), device=device))
        loss.backward()
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def bits(policy, optimizer):
    """Everything that a step changes, as bytes and numbers."""
    tensors = [*policy.parameters(), *policy.buffers()]
    tensors += [value for p in policy.parameters() for value in optimizer.state.get(p, {}).values()]
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return (
        [t.detach().cpu().contiguous().view(-1).view(torch.uint8).tolist() for t in tensors if t.ndim],
        [(t.item(), t.device.type) for t in tensors if not t.ndim],
        options,
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path, steps_before, device):
    policy = Small().to(device)
    optimizer = optimizer_of(policy)
    if steps_before:
        train(policy, optimizer, steps_before)
    state = {"epoch": 1 / 3, "window": [1e-300, math.inf]}
    tensors = {"reference": torch.rand(3, 2, dtype=torch.float64)}
    checkpoints = checkpoints_in(tmp_path, device=device)
    path = checkpoints.save(steps_before, policy=policy, optimizer=optimizer, state=state, tensors=tensors)
    loss = train(policy, optimizer, 2)

    other = Small(seed=1).to(device)
    other.base.load_state_dict(policy.base.state_dict())  # frozen weights are the run's business
    other.passing.copy_(policy.passing)
    other_optimizer = optimizer_of(other)
    train(other, other_optimizer, 1)
    resumed = checkpoints_in(tmp_path, device=device)
    assert resumed.latest() == path
    assert resumed.state(path) == state
    found_state, found_tensors = resumed.load(path, policy=other, optimizer=other_optimizer)
    assert found_state == state
    assert found_tensors["reference"].equal(tensors["reference"])
    assert other.head.weight is other.body.weight
    assert train(other, other_optimizer, 2) == loss
    assert bits(other, other_optimizer) == bits(policy, optimizer)


def test_a_checkpoint_holds_what_is_trained_once_and_nothing_that_is_pickled(tmp_path):
    policy = Small()
    optimizer = optimizer_of(policy)
    train(policy, optimizer, 1)
    path = checkpoints_in(tmp_path).save(1, policy=policy, optimizer=optimizer, state={})
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    (file,) = path.glob("*.safetensors")
    header = json.loads(file.read_bytes()[8 : header_length(file)])
    parameters = {"body.weight", "body.bias", "scale", "short", "turned"}
    assert {name for name in header if name.startswith("policy/")} == {f"policy/{n}" for n in {*parameters, "seen"}}
    states = {f"optimizer/{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in parameters}
    assert {name for name in header if name.startswith("optimizer/")} == states
    assert header["policy/short"]["dtype"] == "BF16"


def test_a_large_checkpoint_lies_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LARGEST_FILE", 200)
    policy = Small()
    optimizer = optimizer_of(policy)
    train(policy, optimizer, 1)
    before = bits(policy, optimizer)
    path = checkpoints_in(tmp_path).save(1, policy=policy, optimizer=optimizer, state={})
    sizes = [file.stat().st_size - header_length(file) for file in path.glob("*.safetensors")]
    assert len(sizes) > 2 and max(sizes) <= 200
    train(policy, optimizer, 1)
    checkpoints_in(tmp_path).load(path, policy=policy, optimizer=optimizer)
    assert bits(policy, optimizer) == before


def header_length(file):
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.fixture
def saved(tmp_path):
    """A policy, its optimizer, and checkpoints of steps 1 and 2."""
    policy = Small()
    optimizer = optimizer_of(policy)
    for step in (1, 2):
        train(policy, optimizer, 1)
        checkpoints_in(tmp_path).save(step, policy=policy, optimizer=optimizer, state={"step": step})
    return policy, optimizer


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


def changed(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def renumbered(path):
    path.write_text(path.read_text().replace('"step": 2', '"step": 7', 1))


SHARD = "rank-00000-000.safetensors"


@pytest.mark.parametrize(
    ("harm", "name"),
    [(harm, name) for harm in (cut_off, changed, os.remove) for name in ("state.json", SHARD)]
    + [(renumbered, "state.json")],
)
def test_a_broken_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, saved, harm, name):
    policy, optimizer = saved
    newest = tmp_path / "checkpoints" / "step-00000002"
    harm(newest / name)
    with pytest.warns(UserWarning, match=rf"step-00000002: {name}.*corrupt; the checkpoint before it"):
        path = checkpoints_in(tmp_path).latest()
    assert path.name == "step-00000001"
    with pytest.raises(InputError, match=f"step-00000002: {name}.*--resume auto"):
        checkpoints_in(tmp_path).load(newest, policy=policy, optimizer=optimizer)
    checkpoints = checkpoints_in(tmp_path)
    with pytest.warns(UserWarning):
        assert checkpoints.load(checkpoints.latest(), policy=policy, optimizer=optimizer)[0] == {"step": 1}
    checkpoints.save(2, policy=policy, optimizer=optimizer, state={"step": "2 again"})  # in the place of the broken one
    assert checkpoints_in(tmp_path).latest() == newest
    assert checkpoints_in(tmp_path).load(newest, policy=policy, optimizer=optimizer)[0] == {"step": "2 again"}


def test_what_was_not_finished_does_not_count_and_is_cleared_away(tmp_path, saved):
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / ".step-00000003.tmp")
    (folder / "step-00000002").rename(folder / ".step-00000002.old")
    checkpoints = checkpoints_in(tmp_path)
    assert checkpoints.latest() == folder / "step-00000001"
    policy, optimizer = saved
    checkpoints.save(3, policy=policy, optimizer=optimizer, state={})
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_checkpoint_that_is_being_deleted_does_not_count(tmp_path, saved, monkeypatch):
    def cut_off_before_the_first_file(path):
        raise KeyboardInterrupt

    policy, optimizer = saved
    checkpoints = checkpoints_in(tmp_path, keep_last=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", cut_off_before_the_first_file)
        checkpoints.save(3, policy=policy, optimizer=optimizer, state={})
    assert sorted(path.name[-1] for path in checkpoints.folder.glob("step-*")) == ["1", "3"]
    checkpoints.save(4, policy=policy, optimizer=optimizer, state={})
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000004"]


def test_a_folder_without_checkpoints_has_no_latest_one(tmp_path):
    assert checkpoints_in(tmp_path).latest() is None


@pytest.mark.filterwarnings("ignore:.*cut off or corrupt")
def test_a_folder_of_broken_checkpoints_is_no_empty_one(tmp_path, saved):
    for path in (tmp_path / "checkpoints").glob("step-*/state.json"):
        path.write_text(path.read_text()[:-9])
    with pytest.raises(InputError, match="none of them is whole"):
        checkpoints_in(tmp_path).latest()


def test_the_newest_and_the_best_are_kept(tmp_path):
    policy = Small()
    optimizer = optimizer_of(policy)
    checkpoints = checkpoints_in(tmp_path, keep_last=2, keep_best=2)
    kept = []
    for step, score in enumerate([0.5, 0.3, math.nan, 0.4, None, 0.6, 0.7], start=1):
        checkpoints.save(step, policy=policy, optimizer=optimizer, state={}, score=score)
        kept.append(sorted(int(path.name[-1]) for path in checkpoints.folder.iterdir()))
    assert kept == [[1], [1, 2], [1, 2, 3], [2, 3, 4], [2, 4, 5], [2, 4, 5, 6], [2, 4, 6, 7]]


def test_a_broken_checkpoint_is_not_kept_in_the_place_of_a_good_one(tmp_path, saved):
    policy, optimizer = saved
    cut_off(tmp_path / "checkpoints" / "step-00000002" / SHARD)
    checkpoints = checkpoints_in(tmp_path, keep_last=2)
    checkpoints.save(3, policy=policy, optimizer=optimizer, state={})
    assert sorted(path.name[-1] for path in checkpoints.folder.iterdir()) == ["1", "3"]


def test_the_new_checkpoint_stays_beside_one_of_a_later_step_that_is_corrupt(tmp_path):
    policy = Small()
    optimizer = optimizer_of(policy)
    checkpoints = checkpoints_in(tmp_path, keep_last=1)
    changed(checkpoints.save(5, policy=policy, optimizer=optimizer, state={}) / SHARD)
    path = checkpoints.save(4, policy=policy, optimizer=optimizer, state={})
    with pytest.warns(UserWarning, match="step-00000005: .* corrupt"):
        assert checkpoints_in(tmp_path).latest() == path


def test_a_whole_checkpoint_of_the_same_step_stays(tmp_path, saved):
    policy, optimizer = saved
    before = (tmp_path / "checkpoints" / "step-00000002" / "state.json").stat()
    checkpoints_in(tmp_path).save(2, policy=policy, optimizer=optimizer, state={})
    assert (tmp_path / "checkpoints" / "step-00000002" / "state.json").stat().st_ino == before.st_ino


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path, saved):
    policy, optimizer = saved
    before = bits(policy, optimizer)
    other = checkpoints_in(tmp_path, fingerprint={**FINGERPRINT, "loss_type": "ipo", "beta": 0.2})
    path = other.latest()
    with pytest.raises(InputError, match='loss_type was "ttpa"'):
        other.state(path)
    with pytest.raises(InputError, match=r'loss_type was "ttpa" and is "ipo", beta was 0\.1 and is 0\.2; give'):
        other.load(path, policy=policy, optimizer=optimizer)
    with pytest.raises(InputError, match='loss_type was "ttpa"'):
        other.save(2, policy=policy, optimizer=optimizer, state={})
    assert bits(policy, optimizer) == before


def test_going_on_from_an_older_checkpoint_than_the_newest_is_refused(tmp_path, saved):
    policy, optimizer = saved
    folder = tmp_path / "checkpoints"
    with pytest.raises(InputError, match="step-00000001: step-00000002 in this folder is newer"):
        checkpoints_in(tmp_path).load(folder / "step-00000001", policy=policy, optimizer=optimizer)
    elsewhere = checkpoints_in(tmp_path / "elsewhere")
    assert elsewhere.load(folder / "step-00000001", policy=policy, optimizer=optimizer)[0] == {"step": 1}


def wider(policy):
    policy.body.weight = policy.head.weight = nn.Parameter(torch.rand(5, 7))


def of_another_dtype(policy):
    policy.short.data = policy.short.data.float()


def all_trained(policy):
    policy.requires_grad_(True)


def nothing_frozen_before(policy):
    policy.turned.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider, r"policy/body.weight is torch.float32 \[5, 6\] in the checkpoint, and torch.float32 \[5, 7\] here"),
        (of_another_dtype, r"policy/short is torch.bfloat16 \[5\] in the checkpoint, and torch.float32 \[5\] here"),
        (all_trained, "base.weight is trained here and not in the checkpoint, .* is"),
        (nothing_frozen_before, "turned is trained in the checkpoint and not here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path, saved, change, message):
    other = Small()
    change(other)
    checkpoints = checkpoints_in(tmp_path)
    with pytest.raises(InputError, match=message):
        checkpoints.load(checkpoints.latest(), policy=other, optimizer=optimizer_of(other))


def test_an_optimizer_with_other_groups_is_refused(tmp_path, saved):
    policy, _ = saved
    checkpoints = checkpoints_in(tmp_path)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad])
    with pytest.raises(InputError, match="other parameter groups"):
        checkpoints.load(checkpoints.latest(), policy=policy, optimizer=optimizer)


def test_modules_that_are_wrapped_keep_their_names(tmp_path, saved):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    policy, _ = saved
    other = Small(seed=1)
    other.body = checkpoint_wrapper(other.body)
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.load(checkpoints.latest(), policy=other, optimizer=optimizer_of(other))
    assert other.body.weight.equal(policy.body.weight)


@contextmanager
def largest_file(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 10_000])  # in a file of tensors, in state.json
def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tmp_path, saved, size):
    policy, optimizer = saved
    checkpoints = checkpoints_in(tmp_path, keep_last=1)
    with largest_file(size), pytest.raises(InputError, match=r"checkpoint cannot be written: .* are kept"):
        checkpoints.save(3, policy=policy, optimizer=optimizer, state={})
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000001", "step-00000002"]
    checkpoints.save(3, policy=policy, optimizer=optimizer, state={"step": 3})
    assert checkpoints_in(tmp_path).load(checkpoints.latest(), policy=policy, optimizer=optimizer)[0] == {"step": 3}


def test_a_full_disk_loses_nothing(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        policy = nn.Linear(30, 30)  # 12 kB with its optimizer, so that the disk holds some of them and then no more
        optimizer = torch.optim.AdamW(policy.parameters())
        policy(torch.ones(30)).sum().backward()
        optimizer.step()
        checkpoints = checkpoints_in(tmp_path, keep_last=100)
        with pytest.raises(InputError, match="No space left on device"):
            for step in range(1, 100):
                checkpoints.save(step, policy=policy, optimizer=optimizer, state={"step": step})
        assert 1 < step < 10
        path = checkpoints.latest()
        assert checkpoints.load(path, policy=policy, optimizer=optimizer)[0] == {"step": step - 1}
        assert not list(checkpoints.folder.glob(".*"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def save_without_end(folder, first, counter):
    torch.set_num_threads(1)
    policy = Small()
    optimizer = optimizer_of(policy)
    checkpoints = checkpoints_in(folder, keep_last=1)
    for step in range(first, first + 10_000):
        train(policy, optimizer, 1)
        checkpoints.save(step, policy=policy, optimizer=optimizer, state={"step": step})
        counter.value = step


def test_a_run_killed_at_any_moment_leaves_its_last_checkpoint_whole(tmp_path):
    processes = multiprocessing.get_context("fork")
    counter = processes.Value("q", 0, lock=False)
    rng = random.Random(0)
    policy = Small()
    cut_off_while_saving = 0
    for _ in range(15):
        first = counter.value + 1
        process = processes.Process(target=save_without_end, args=(tmp_path, first, counter))
        process.start()
        while counter.value < first:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        checkpoints = checkpoints_in(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            state, _ = checkpoints.load(checkpoints.latest(), policy=policy, optimizer=optimizer_of(policy))
        assert counter.value <= state["step"] <= counter.value + 1
        cut_off_while_saving += len(list(checkpoints.folder.glob(".step-*"))) > 0
        counter.value = state["step"]
    assert cut_off_while_saving > 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_stop_is_noted_and_nothing_else(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
    assert signal.getsignal(number) is before
