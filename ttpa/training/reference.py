"""Reference log-probabilities: computed once and kept, recorded by the sampler, or of weights that move along."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ttpa.errors import InputError
from ttpa.training.examples import Example
from ttpa.training.packing import best_fit, split_example
from ttpa.training.reference_cache import ReferenceCache, content_key
from ttpa.training.trained import WRAPPERS
from ttpa.trees.pack import Term, TreeBatch, completion_tokens, pack_trees, packed_tokens
from ttpa.trees.record import Leaf, Pair, PreferenceTree
from ttpa.world import World

Compute = Callable[[TreeBatch], torch.Tensor]
"""Log-probabilities in nats, fp32 `[R]`, of the head rows of a pack; it moves the pack to where the model is."""


@dataclass(frozen=True)
class Filled:
    """What `fill` found, over all processes: trees of different content that the cache knew and that were computed,
    seconds, and for each shard that could not be used its name and why."""

    hits: int
    computed: int
    seconds: float
    broken: tuple[str, ...]


def fill(
    cache: ReferenceCache,
    trees: Sequence[PreferenceTree],
    *,
    compute: Compute,
    pack_tokens: int,
    world: World | None = None,
    progress: Callable[[int, int], None] | None = None,
    sampled: bool = False,
    save_seconds: float = 30.0,
) -> Filled:
    """Compute what the cache does not know yet of the tokens that the model wrote on the way to leaves in pairs; with
    `sampled`, those alone that the sampler has recorded no log-probability of.

    Every process gives the same trees and calls `compute` as often as the others, on its own share of the packs (of at
    most `pack_tokens` tokens; a longer tree is cut as in training). Packs, and so the bits, are the same for any number
    of processes and after an interruption, which loses the last `save_seconds` of work. `progress` gets the packs that
    are done and their number. Raises InputError where a shard cannot be written or read by all
    processes, and for a log-probability that is not finite.
    """
    start = time.perf_counter()
    world = world or World()
    packs, hits, computed = _missing(cache, trees, pack_tokens=pack_tokens, sampled=sampled)
    _check_same_files(cache, packs, world=world)
    broken = tuple(f"{path}: {why}" for path, why in cache.broken.items())
    cache.forget_broken(delete=world.main)
    world.barrier()  # what is deleted may be written again under the same name
    records: dict[bytes, np.ndarray] = {}
    saved = time.perf_counter()
    for done in range(0, len(packs), world.size):
        mine = done + world.rank
        pack = packs[min(mine, len(packs) - 1)]  # one pack too many rather than one call too few: others wait for it
        found = logps_of_pack([part.tree for part in pack], compute)
        if mine < len(packs):
            for part, logps in zip(pack, found, strict=True):
                record = records.setdefault(part.key, np.full(len(logps), np.nan, dtype=np.float32))
                record[part.tokens] = logps[part.tokens]
        now = time.perf_counter()
        if records and (now - saved >= save_seconds or done + world.size >= len(packs)):
            cache.write(records, rank=world.rank)
            records, saved = {}, now
        if progress:
            progress(min(done + world.size, len(packs)), len(packs))
    world.barrier()
    cache.refresh()
    unknown = [
        part for pack in packs for part in pack if np.isnan(cache.get(part.tree, key=part.key)[part.tokens]).any()
    ]
    if world.any(bool(unknown)):
        raise InputError(
            "some of what was just written is not there: use a folder that all nodes share", path=cache.folder
        )
    return Filled(hits, computed, time.perf_counter() - start, broken)


def logps_of(tree: PreferenceTree, cache: ReferenceCache, *, sampled: bool = False) -> np.ndarray:
    """The log-probabilities in nats, fp32, of the completion tokens of all nodes in order, from a cache that was filled
    for this tree, or with `sampled` the sampler's where it has recorded one; NaN for tokens that nobody asked for."""
    logps = _known(tree, cache, sampled=sampled)
    assert not np.isnan(logps[_needed(tree)]).any(), "fill the cache first"
    return logps


def token_scores(plus: np.ndarray, minus: np.ndarray) -> np.ndarray:
    """How much better a token is to one helper model than to the other, fp32: `log p_plus - log p_minus`, the score of
    TIS-DPO (arXiv 2410.04350), TGDPO (2506.14574) and SePO (2408.13518), each of which says what the two models are."""
    return plus - minus


def logps_of_pack(trees: Sequence[PreferenceTree], compute: Compute) -> list[np.ndarray]:
    """Log-probabilities, fp32, of the completion tokens of each tree, computed as one pack without gradients; NaN as in
    `logps_of`. Raises InputError for one that is not finite."""
    pack = pack_trees(trees, terms=(Term(sides=True),))
    with torch.no_grad():
        logp_R = compute(pack)
    assert logp_R.shape == pack.place_R.shape, "one log-probability a row"
    sizes = [completion_tokens(tree) for tree in trees]
    flat = np.full(sum(sizes), np.nan, dtype=np.float32)
    flat[pack.place_R.numpy()] = logp_R.float().cpu().numpy()
    found = np.split(flat, np.cumsum(sizes)[:-1])
    for tree, logps in zip(trees, found, strict=True):
        if not np.isfinite(logps[_needed(tree)]).all():
            raise InputError(
                f"the reference model gives a token of tree {tree.id!r} a log-probability that is not finite: its "
                "weights are broken, or too large for the dtype of compute (try --bf16 false)"
            )
    return found


@dataclass(frozen=True)
class _Part:
    """A tree, or a part of it, that is computed, and for which of its completion tokens (bool)."""

    key: bytes
    tree: PreferenceTree
    tokens: np.ndarray


def _missing(
    cache: ReferenceCache, trees: Sequence[PreferenceTree], *, pack_tokens: int, sampled: bool
) -> tuple[list[list[_Part]], int, int]:
    """The packs that have to be computed, and of how many trees nothing and something has to be.

    Trees are cut as if nothing were known, and a token that several parts share belongs to the first. Best fit lays out
    the rest as before when whole packs are taken away, so what shares a pack does not depend on how far an earlier run
    got.
    """
    # for each content: a tree, the nodes that any tree of this content needs, and its tokens that one of them lacks
    asked: dict[bytes, tuple[PreferenceTree, set[int], np.ndarray]] = {}
    for tree in trees:
        if tree.pairs:
            key = content_key(tree)
            _, nodes, unknown = asked.setdefault(key, (tree, set(), np.zeros(completion_tokens(tree), dtype=bool)))
            nodes |= _paired_nodes(tree)
            unknown |= _needed(tree) & np.isnan(_known(tree, cache, key=key, sampled=sampled))
    missing = {key: entry for key, entry in asked.items() if entry[2].any()}
    parts: list[_Part] = []
    for key, (tree, nodes, unknown) in missing.items():
        for part in split_example(Example(_ending_at(tree, nodes), weights=[]), max_tokens=pack_tokens):
            tokens = _needed(part.tree) & unknown
            unknown = unknown & ~tokens
            if tokens.any():
                parts.append(_Part(key, part.tree, tokens))
    groups = best_fit([packed_tokens(part.tree) for part in parts], max_tokens=pack_tokens)
    return [[parts[i] for i in group] for group in groups], len(asked) - len(missing), len(missing)


def _known(tree: PreferenceTree, cache: ReferenceCache, *, sampled: bool, key: bytes | None = None) -> np.ndarray:
    """What need not be computed, NaN elsewhere."""
    cached = cache.get(tree, key=key)
    if not sampled:
        return cached
    recorded = sampled_logps(tree)
    return np.where(np.isnan(recorded), cached, recorded)


def _paired_nodes(tree: PreferenceTree) -> set[int]:
    """The nodes on the way to a leaf that stands in a pair."""
    return {n for pair in tree.pairs for leaf in (pair.chosen, pair.rejected) for n in tree.path(leaf)}


def _needed(tree: PreferenceTree) -> np.ndarray:
    """For each completion token, all nodes in order, whether its log-probability is read (bool)."""
    nodes = _paired_nodes(tree)
    written = [
        np.full(len(node.ids), n in nodes) & (node.trained is None or np.array(node.trained, dtype=bool))
        for n, node in enumerate(tree.nodes)
    ]
    return np.concatenate([np.zeros(0, dtype=bool), *written])


def _ending_at(tree: PreferenceTree, nodes: set[int]) -> PreferenceTree:
    """The tree with such leaves and pairs that these nodes are packed, which hold the parents of each."""
    inner = {tree.nodes[n].parent for n in nodes}
    leaves = [Leaf(n, "given") for n in sorted(nodes - inner)]
    return replace(tree, leaves=leaves, pairs=[Pair(leaf, leaf) for leaf in range(len(leaves))])


def _check_same_files(cache: ReferenceCache, packs: Sequence[Sequence[_Part]], *, world: World) -> None:
    """Go on when all processes have read the cache, before the first one writes to it; raises InputError, in all of
    them, where they have found other shards."""
    plan = hashlib.blake2b()
    for pack in packs:
        for part in pack:
            plan.update(part.key + np.packbits(part.tokens).tobytes())
    shared = world.share_text(plan.hexdigest())
    if world.any(plan.hexdigest() != shared):
        raise InputError("not all processes see the same files: use a folder that all nodes share", path=cache.folder)


TOLERANCE = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (2.0, 0.05)}
"""How far log-probabilities of the sampler may be from computed ones, in nats: any one of them, and their mean."""


@dataclass(frozen=True)
class Agreement:
    """How far recorded log-probabilities are from computed ones, in nats: the largest and the mean difference."""

    largest: float
    mean: float
    tokens: int


def sampled_logps(tree: PreferenceTree) -> np.ndarray:
    """The log-probabilities that the sampler recorded, fp32, in the order of `logps_of`; NaN where it recorded none, as
    in a gold completion that it did not decode."""
    recorded = [[np.nan] * len(node.ids) if node.logps is None else node.logps for node in tree.nodes]
    return np.array([logp for logps in recorded for logp in logps], dtype=np.float32)


def check_sampled(
    trees: Sequence[PreferenceTree], *, compute: Compute, pack_tokens: int, dtype: torch.dtype, num_packs: int = 8
) -> Agreement:
    """Compare the sampler's log-probabilities with computed ones on `num_packs` packs, taken evenly from all.

    Every process computes all of them. `dtype` is that of compute: in fp32 no token may be off by more than 1e-3 nats;
    bf16 rounds logits at 2^-8 of their size, so that single unlikely tokens differ far more than most, and it is the
    mean that may not be above 0.05 nats. Raises InputError with the numbers and the tree that is off most, and where no
    tree has any recorded.
    """
    parts = [
        part.tree
        for tree in trees
        if not np.isnan(sampled_logps(tree)[_needed(tree)]).all()
        for part in split_example(Example(tree, weights=[]), max_tokens=pack_tokens)
    ]
    if not parts:
        name = repr(trees[0].id) if trees else "none"
        raise InputError(
            f"no tree has log-probabilities of the sampler (the first is {name}): leave out --reference sampled, so "
            "that they are computed with the model"
        )
    groups = best_fit([packed_tokens(part) for part in parts], max_tokens=pack_tokens)
    taken = np.linspace(0, len(groups) - 1, min(num_packs, len(groups))).round().astype(int)
    differences: list[tuple[np.ndarray, str]] = []
    for group in (groups[i] for i in taken):
        pack = [parts[i] for i in group]
        for tree, logps in zip(pack, logps_of_pack(pack, compute), strict=True):
            off = np.abs(logps - sampled_logps(tree))[_needed(tree)].astype(np.float64)
            differences.append((off[~np.isnan(off)], tree.id))
    every = np.concatenate([off for off, _ in differences])
    found = Agreement(float(every.max(initial=0.0)), float(every.sum()) / max(len(every), 1), len(every))
    largest, mean = TOLERANCE[dtype]
    if found.largest > largest or found.mean > mean:
        worst = max((off.max(initial=0.0), name) for off, name in differences)[1]
        raise InputError(
            f"the sampler's log-probabilities are not those of this model: over {found.tokens} tokens they differ by "
            f"{found.mean:.2g} nats on average and by {found.largest:.2g} at most, in tree {worst!r}; {mean:g} and "
            f"{largest:g} are allowed. Give the model that sampled the trees, or leave out --reference sampled, so "
            "that they are computed"
        )
    return found


class MovingReference:
    """A reference that follows the policy (TR-DPO, arXiv 2404.09656): a copy of the trainable weights, shard by shard
    where they are sharded, which every `steps` steps becomes `alpha * policy + (1 - alpha) * copy`. Raises InputError
    for an alpha or a number of steps that makes no sense."""

    def __init__(self, policy: nn.Module, *, alpha: float, steps: int) -> None:
        if not 0 < alpha <= 1:
            raise InputError(f"--ref_model_mixup_alpha must lie in (0, 1], not {alpha}")
        if steps < 1:
            raise InputError(f"--ref_model_sync_steps must be at least 1, not {steps}")
        self.policy, self.alpha, self.steps = policy, alpha, steps
        self._forget()
        self._weights = {
            WRAPPERS.sub("", name): weight for name, weight in policy.named_parameters() if weight.requires_grad
        }
        self._copies = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the reference after optimizer step `step`, counted from 1, when it is time."""
        if step % self.steps == 0:
            for name, copy in self._copies.items():
                copy.mul_(1 - self.alpha).add_(self._weights[name], alpha=self.alpha)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The policy with the reference's weights, for forward passes without gradients; afterwards, whatever happens,
        its own again, to the bit. It stands before the policy's forward, whose backward would find its weights
        changed."""
        exchanged: list[str] = []
        try:
            for name in self._copies:
                self._exchange(name)
                exchanged.append(name)
            self._forget()
            yield
        finally:
            for name in exchanged:
                self._exchange(name)
            self._forget()

    def state(self) -> dict[str, torch.Tensor]:
        """The reference's weights by name, for a checkpoint; sharded where the policy is."""
        return dict(self._copies)

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state` returned, in whole tensors or sharded as here. Raises InputError where names or shapes
        are others."""
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in self._copies.items()}:
            raise InputError(
                "the moving reference of the checkpoint is that of another model or of other trained weights"
            )
        for name, copy in self._copies.items():
            value = state[name]
            if isinstance(copy, DTensor) and not isinstance(value, DTensor):
                whole = value.to(copy.device)  # every process has it, so none sends it
                value = distribute_tensor(whole, copy.device_mesh, copy.placements, src_data_rank=None)
            copy.copy_(value)

    @torch.no_grad()
    def _exchange(self, name: str) -> None:
        weight, copy = self._weights[name], self._copies[name]
        kept = weight.clone()
        weight.copy_(copy)
        copy.copy_(kept)

    def _forget(self) -> None:
        """Drop what was made of the weights and would outlive an exchange: gathered and cast ones."""
        torch.clear_autocast_cache()
        for module in self.policy.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
