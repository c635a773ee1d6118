"""Floating-point operations of a pack, counted from its trees and from the shapes of a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ttpa.trees.pack import Term, TreeBatch
from ttpa.trees.record import PreferenceTree


@dataclass(frozen=True)
class ModelShape:
    """What decides the cost of a decoder.

    `linear` counts the parameters of the matrices that every token is multiplied with, `head` those of the language
    model head; the `_trained` ones are the part of each whose gradient is wanted. `attention` is the number of heads
    times their width, summed over layers.
    """

    linear: int
    linear_trained: int
    head: int
    head_trained: int
    attention: int

    @classmethod
    def of(cls, model: PreTrainedModel | PreTrainedConfig) -> ModelShape:
        """The shape of a model, on any device and with adapters where it has them, or of what a config describes,
        all of it trained. Of a mixture of experts, those count that one token goes to."""
        if isinstance(model, PreTrainedConfig):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(model)
        text = model.config.get_text_config(decoder=True)
        head_modules = set(model.get_output_embeddings().modules())
        count = {(in_head, trained): 0 for in_head in (False, True) for trained in (False, True)}
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                continue
            for weight in module.parameters(recurse=False):
                if isinstance(module, nn.Linear) and weight is module.weight:
                    size = module.in_features * module.out_features  # a quantised weight has fewer elements
                elif weight.ndim == 3:
                    size = weight.numel() // len(weight) * text.num_experts_per_tok
                else:
                    size = weight.numel() if weight.ndim == 2 else 0
                count[module in head_modules, weight.requires_grad] += size
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            linear=count[False, False] + count[False, True],
            linear_trained=count[False, True],
            head=count[True, False] + count[True, True],
            head_trained=count[True, True],
            attention=text.num_hidden_layers * text.num_attention_heads * width,
        )


@dataclass(frozen=True)
class PackSize:
    """What decides the cost of a pack: its tokens, the tokens that each of them sees (itself among them) summed over
    all, and its head rows, those that are trained and those that are only reported."""

    tokens: int
    seen: int
    trained_rows: int
    reported_rows: int

    def __add__(self, other: PackSize) -> PackSize:
        return PackSize(
            self.tokens + other.tokens,
            self.seen + other.seen,
            self.trained_rows + other.trained_rows,
            self.reported_rows + other.reported_rows,
        )


def forward_flops(shape: ModelShape, size: PackSize) -> int:
    """Operations of the forward pass of a pack, a product and a sum counted as two: `2 linear` for each token,
    `4 attention` for each token that a token sees (`Q K^T` and `P V`), `2 head` for each head row. Norms, rotations and
    activations are left out, as everywhere (Kaplan et al., arXiv 2001.08361, 2.1)."""
    rows = size.trained_rows + size.reported_rows
    return 2 * shape.linear * size.tokens + 4 * shape.attention * size.seen + 2 * shape.head * rows


def pack_flops(shape: ModelShape, size: PackSize) -> int:
    """Operations of the forward and the backward pass of a pack. Backward, a matrix costs its forward pass once for
    the gradient of its input and, where it is trained, once for its own, and attention twice its forward pass; only
    trained rows go back through the head. What is computed again to save memory is not counted, so that the share of
    the peak rate that follows is model FLOPs utilisation (Chowdhery et al., arXiv 2204.02311, appendix B)."""
    backward = 2 * (shape.linear + shape.linear_trained) * size.tokens + 8 * shape.attention * size.seen
    return forward_flops(shape, size) + backward + 2 * (shape.head + shape.head_trained) * size.trained_rows


def size_of_batch(batch: TreeBatch) -> PackSize:
    """The size of a pack. It is read on the host: ask before the pack goes to a GPU."""
    tokens, rows = len(batch.ids_T), len(batch.row_R)
    return PackSize(tokens, int(batch.position_T.sum()) + tokens, batch.num_trained, rows - batch.num_trained)


def size_of_trees(trees: Sequence[PreferenceTree], *, terms: Sequence[Term] = (Term(),)) -> PackSize:
    """The size of `pack_trees(trees, terms=terms)`, without packing them."""
    total = PackSize(0, 0, 0, 0)
    for t, tree in enumerate(trees):
        start = np.cumsum([0, *(len(node.ids) for node in tree.nodes)])
        depth, written = np.zeros(start[-1], dtype=np.int64), np.zeros(start[-1], dtype=bool)
        for n, node in enumerate(tree.nodes):
            above = len(tree.prompt_ids) if node.parent < 0 else depth[start[node.parent + 1] - 1]
            depth[start[n] : start[n + 1]] = np.arange(above + 1, above + 1 + len(node.ids))
            written[start[n] : start[n + 1]] = True if node.trained is None else node.trained
        nodes = {leaf: tree.path(leaf) for pair in tree.pairs for leaf in (pair.chosen, pair.rejected)}
        paths = {
            leaf: np.concatenate([np.arange(start[n], start[n + 1]) for n in path]) for leaf, path in nodes.items()
        }
        packed, trained = np.zeros(start[-1], dtype=bool), np.zeros(start[-1], dtype=bool)
        for path in paths.values():
            packed[path] = True
        for term in terms:
            for p, pair in enumerate(tree.pairs):
                sides = [paths[pair.chosen], paths[pair.rejected]]
                given = [written[side] for side in sides] if term.weights is None else term.weights[t][p]
                weights = [np.asarray(weight, dtype=np.float64) for weight in given]
                shared = 0
                if not term.sides:
                    both = zip(nodes[pair.chosen], nodes[pair.rejected], strict=False)
                    shared = sum(len(tree.nodes[n].ids) for n, other in both if n == other)
                    differ = weights[0][:shared] != weights[1][:shared]
                    trained[sides[0][:shared][differ]] = True
                for side, weight in zip(sides, weights, strict=True):
                    trained[side[shared:][weight[shared:] != 0]] = True
        prompt = len(tree.prompt_ids)
        total += PackSize(
            prompt + int(packed.sum()),
            prompt * (prompt + 1) // 2 + int(depth[packed].sum()),
            int(trained.sum()),
            int((packed & written & ~trained).sum()),
        )
    return total


def size_without_sharing(trees: Sequence[PreferenceTree]) -> PackSize:
    """What a trainer computes that shares nothing: each side of each pair is a row of its own, prompt and completion,
    and every completion token that the model wrote goes through the head. A leaf paired with itself is one row."""
    total = PackSize(0, 0, 0, 0)
    for tree in trees:
        rows = {}
        for leaf in {leaf for pair in tree.pairs for leaf in (pair.chosen, pair.rejected)}:
            written = tree.trained(leaf)
            tokens = len(tree.prompt_ids) + len(written)
            rows[leaf] = PackSize(tokens, tokens * (tokens + 1) // 2, sum(written), 0)
        for pair in tree.pairs:
            for leaf in {pair.chosen, pair.rejected}:
                total += rows[leaf]
    return total
