"""How far a policy's log-probabilities are from those of the model that it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from ttpa.errors import InputError
from ttpa.model import evaluating, head_weight, load_model, packed_logps
from ttpa.training.examples import Example
from ttpa.training.packing import best_fit, split_example
from ttpa.training.reference import logps_of_pack, sampled_logps
from ttpa.trees.pack import completion_tokens, packed_tokens
from ttpa.trees.record import Pair, PreferenceTree
from ttpa.viewer.records import highest_id

PACK_TOKENS = 4096


def log_ratios(trees: Sequence[PreferenceTree], *, policy: str, ref_model: str | None) -> list[np.ndarray]:
    """`log p_policy - log p_reference` in nats, fp32, of every completion token of each tree, all nodes in order; the
    reference is `ref_model`, or the sampler where that is None. NaN for tokens that the model did not write, for those
    on the way to no leaf, and where the sampler recorded nothing. Raises InputError where it recorded nothing at all,
    and for a model that cannot be loaded or has fewer tokens than the trees."""
    if ref_model is None and all(node.logps is None for tree in trees for node in tree.nodes):
        raise InputError("the trees have no log-probabilities of a sampler to compare --policy with: give --ref_model")
    policy_logps = all_logps(_loaded(policy, trees), trees)
    if ref_model is None:
        reference_logps = [sampled_logps(tree) for tree in trees]
    else:
        reference_logps = all_logps(_loaded(ref_model, trees), trees)
    return [one - other for one, other in zip(policy_logps, reference_logps, strict=True)]


def all_logps(
    model: PreTrainedModel, trees: Sequence[PreferenceTree], *, pack_tokens: int = PACK_TOKENS
) -> list[np.ndarray]:
    """Log-probabilities in nats, fp32, of every completion token of each tree, all nodes in order, computed in packs of
    at most `pack_tokens` tokens (a longer path has a pack to itself); NaN as in `log_ratios`. Raises InputError for one
    that is not finite."""
    found = [np.full(completion_tokens(tree), np.nan, dtype=np.float32) for tree in trees]
    parts = [
        (t, part.tree) for t, tree in enumerate(trees) for part in split_example(_whole(tree), max_tokens=pack_tokens)
    ]
    with evaluating(model):
        for pack in best_fit([packed_tokens(part) for _, part in parts], max_tokens=pack_tokens):
            logps = logps_of_pack(
                [parts[i][1] for i in pack], lambda batch: packed_logps(model, batch.to(model.device)).cpu()
            )
            for i, some in zip(pack, logps, strict=True):
                t = parts[i][0]
                found[t] = np.where(np.isnan(found[t]), some, found[t])
    return found


def _whole(tree: PreferenceTree) -> Example:
    """The tree with such pairs that all its leaves are packed."""
    return Example(replace(tree, pairs=[Pair(leaf, leaf) for leaf in range(len(tree.leaves))]), weights=[])


def _loaded(path: str, trees: Sequence[PreferenceTree]) -> PreTrainedModel:
    model = load_model(path, dtype=torch.float32)
    size = len(head_weight(model))
    for tree in trees:
        if highest_id(tree) >= size:
            raise InputError(
                f"tree {tree.id!r} has the token id {highest_id(tree)}, and the model only {size} tokens: give one "
                "that the trees are for",
                path=path,
            )
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]  # transformers wraps it untyped
    return model
