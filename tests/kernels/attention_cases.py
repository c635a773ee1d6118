"""What the tests of tree attention share: packs, inputs, gradients and how far they may be off."""

from __future__ import annotations

import torch
from random_trees import random_tree
from ttpa_kernels.tree_attention.reference import tree_attention_reference

from ttpa.trees.pack import pack_trees


def branches(prompt: int, *lengths: int, offset: int = 0) -> list[int]:
    """The ends of one tree: a prompt and branches that leave it at its end."""
    at, ends = offset + prompt, []
    for length in lengths:
        ends += [at + length] * length
        at += length
    return [at] * prompt + ends


PACKS = {
    "one token": torch.tensor([1]),
    "a chain": torch.full((37,), 37),
    "tokens that see themselves only": 1 + torch.arange(19),
    "a small tree": torch.tensor(branches(19, 7, 10)),
    "a prompt and branches": torch.tensor(branches(40, 9, 5, 16)),
    "nested trees": pack_trees([random_tree(seed, num_leaves=5) for seed in (1, 2, 3)]).end_T,
    "ends that are no tree": torch.tensor([3, 5, 4, 6, 9, 6, 8, 8, 9, 10]),
}


def inputs(T: int, *, N: int = 4, G: int = 2, D: int = 16, dtype: torch.dtype = torch.float32, device="cpu"):
    """Query, key and value as transformers hands them over (views of `[1, T, heads, D]`), and an upstream gradient."""
    generator = torch.Generator().manual_seed(T + N + D)
    tensors = [torch.randn(1, T, heads, D, generator=generator).to(device, dtype) for heads in (N, G, G, N)]
    query, key, value, upstream = (x.transpose(1, 2) for x in tensors)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), upstream


def results(function, query, key, value, upstream):
    """The output and the gradients of query, key and value."""
    out = function(query, key, value)
    return out.detach(), *torch.autograd.grad(out, (query, key, value), upstream.to(out.dtype))


def assert_as_good_as_eager(function, end_T, *tensors, scale: float | None = None):
    """Output and gradients are at most 1.5 times as far from float64 as eager attention of the same dtype."""

    def written_out(dtype):
        return lambda q, k, v: tree_attention_reference(q, k, v, end_T, scale=scale, dtype=dtype)

    got = results(function, *tensors)
    want = results(written_out(torch.float64), *(x.detach().double().requires_grad_() for x in tensors))
    eager = results(written_out(tensors[0].dtype), *tensors)
    ulps = 5e-7 * max(x.norm() for x in want)  # a gradient that vanishes is a difference of numbers that do not
    for name, a, b, c in zip(("out", "dquery", "dkey", "dvalue"), got, want, eager, strict=True):
        assert a.shape == b.shape and a.dtype == tensors[0].dtype
        allowed = 1.5 * (c - b).norm() + ulps
        assert (a - b).norm() <= allowed, (name, float((a - b).norm()), float(allowed))
