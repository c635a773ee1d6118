"""Pairs, head rows and heads that the tests of the preference losses share."""

from __future__ import annotations

import torch
from random_trees import random_tree
from ttpa_kernels.linear_token_dpo.reference import linear_token_dpo_reference

from ttpa.trees.pack import pack_trees

LOSSES = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "label_smoothing": 0.1},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "hinge"},
    {"loss_type": "ipo"},
    {"loss_type": "linear"},
]
NAMES = ("hidden_RH", "weight_VH", "bias_V", "adapter_RA", "adapter_VA")


def sparse(P: int, R: int, density: float, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random coefficients, some of them stored zeros, some rows and pairs without any."""
    generator = torch.Generator().manual_seed(seed)
    filled = torch.rand(P, R, generator=generator) < density
    value = torch.randn(P, R, generator=generator, dtype=dtype) * (torch.rand(P, R, generator=generator) < 0.9)
    return torch.sparse_coo_tensor(filled.nonzero().T, value[filled], (P, R), check_invariants=True).coalesce()


def trees(*seeds: int) -> torch.Tensor:
    return pack_trees([random_tree(seed, tools=True) for seed in seeds]).C


def rows(C: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logp, ref_logp = -3 * torch.rand(2, C.shape[1], generator=generator, dtype=torch.float64).to(dtype)
    return logp.requires_grad_(), ref_logp


def matrix(*blocks: torch.Tensor, unused: int = 0, shuffle: int | None = None) -> torch.Tensor:
    """Components beside each other, and rows without a coefficient; shuffled, where a seed is given."""
    dense = torch.block_diag(*blocks, torch.zeros(0, unused, dtype=torch.float64))
    if shuffle is not None:
        generator = torch.Generator().manual_seed(shuffle)
        dense = dense[torch.randperm(len(dense), generator=generator)]
        dense = dense[:, torch.randperm(dense.shape[1], generator=generator)]
    return dense.to_sparse()


def pair(rows: int) -> torch.Tensor:
    """One pair, all its rows its own."""
    return torch.where(torch.arange(rows) < rows // 2, 1.0, -0.5).double()[None]


def tree(pairs: int, rows: int) -> torch.Tensor:
    """One chosen side for several rejected ones, and a row that only some of them share."""
    chosen = torch.ones(pairs, rows, dtype=torch.float64)
    shared = torch.linspace(0, 1, pairs, dtype=torch.float64)[:, None]
    return torch.cat([chosen, shared, -torch.block_diag(*[pair(rows).abs()] * pairs)], dim=1)


MATRICES = {
    "trees": lambda: pack_trees([random_tree(seed, tools=True) for seed in (0, 1)]).C,
    "singles": lambda: matrix(pair(12), pair(9), pair(3)),
    "one pair": lambda: matrix(pair(14)),
    "mixed": lambda: matrix(tree(3, 4), pair(11), tree(2, 2), pair(13), pair(2), unused=9, shuffle=1),
    "empty pairs": lambda: matrix(torch.zeros(2, 3, dtype=torch.float64), tree(2, 3), unused=2),
    "no entries": lambda: torch.zeros(2, 6, dtype=torch.float64).to_sparse(),
    "no rows": lambda: torch.zeros(2, 0, dtype=torch.float64).to_sparse(),
    "no pairs": lambda: torch.zeros(0, 5, dtype=torch.float64).to_sparse(),
}


def inputs(C: torch.Tensor, *, H=6, V=37, A=2, dtype=torch.float32, needs=NAMES, peak=2.0):
    """Hidden states, head with bias and adapter, targets (the last column among them), and reference."""
    generator = torch.Generator().manual_seed(C.shape[1])
    shapes = {"hidden_RH": (C.shape[1], H), "weight_VH": (V, H), "bias_V": (V,), "adapter_RA": (C.shape[1], A)}
    shapes["adapter_VA"] = (V, A)
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    given["weight_VH"] *= peak / H**0.5
    given["adapter_VA"] *= 0.3
    given = {name: x.to(dtype).requires_grad_(name in needs) for name, x in given.items()}
    target = torch.randint(V, (C.shape[1],), generator=generator)
    target[: len(target) // 4] = V - 1
    return given, target, -3 * torch.rand(C.shape[1], generator=generator)


def gradients(loss, given):
    wanted = [x for x in given.values() if x.requires_grad]
    return torch.autograd.grad(loss, wanted, torch.tensor(-1.3, dtype=loss.dtype))


def reference(given, target, ref_logp, C, **loss):
    head = {name: x for name, x in given.items() if name not in ("hidden_RH", "weight_VH")}
    head |= {name: loss.pop(name) for name in ("logit_scale", "softcap", "temperature") if name in loss}
    return linear_token_dpo_reference(
        given["hidden_RH"], given["weight_VH"], target, ref_logp, C.to_dense(), head=head, **loss
    )


def close(got, want, eager=None, *, ulps: float = 8.0) -> None:
    """The error is at most 1.5 times that of eager PyTorch in the same dtype, or a few roundings."""
    error, size = (got.double() - want.double()).norm(), want.double().norm()
    allowed = ulps * torch.finfo(got.dtype).eps * size + 1e-30
    if eager is not None:
        allowed += 1.5 * (eager.double() - want.double()).norm()
    assert error <= allowed, f"error {error:.2e} of {size:.2e}, allowed {allowed:.2e}"
