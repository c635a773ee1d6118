"""The sparse matrix of a preference loss, in the orders in which kernels read it.

P pairs, R head rows, E entries, K connected components of the graph of rows and pairs (of packed trees: the trees).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


class Structure(NamedTuple):
    """The entries of C twice, by pair and by row; both go through the components one after the other.

    Of the i-th pair, `order_P[i]`, the entries lie at `start_P[i]` to `start_P[i + 1]` of `row_E` and `value_E`; of
    the i-th row, `order_R[i]`, at `start_R[i]` to `start_R[i + 1]` of `pair_E` and `coefficient_E`. Rows without an
    entry come last. All indexes are int64, `row_E` and `pair_E` hold the numbers of the original matrix.
    """

    order_P: torch.Tensor
    start_P: torch.Tensor
    row_E: torch.Tensor
    value_E: torch.Tensor
    order_R: torch.Tensor
    start_R: torch.Tensor
    pair_E: torch.Tensor
    coefficient_E: torch.Tensor


@dataclass(frozen=True)
class PairMatrix:
    """The coefficients `C [P, R]` of rows in the margins of pairs, without its zeros; `num_used` rows have an entry.

    `component_K3` stays on the CPU: the first pair (place in `order_P`), row (place in `order_R`) and entry of each
    component, and the ends of all three in a last line. `in_order`: every row has an entry and `order_R` is 0 to R - 1.
    """

    structure: Structure
    component_K3: torch.Tensor
    num_rows: int
    num_used: int
    in_order: bool

    @property
    def num_pairs(self) -> int:
        return len(self.structure.order_P)

    @classmethod
    def from_sparse(cls, C: torch.Tensor) -> PairMatrix:
        """Read a sparse matrix [P, R] of fp32 or fp64; the result is on its device.

        The work is done on the CPU: give a matrix that lies there and call `to`, so that the CPU need not wait for a
        GPU. The coefficients are constants: no gradient goes to them. Raises TypeError for other dtypes and
        ValueError for what is no sparse matrix.
        """
        if C.layout == torch.strided or C.ndim != 2:
            raise ValueError(f"C is {C.layout} with {C.ndim} dimensions: give a sparse matrix [P, R], C.to_sparse()")
        if C.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"C is {C.dtype}: convert it to torch.float32 or torch.float64")
        (P, R), device = C.shape, C.device
        entries = C.detach().cpu().to_sparse_coo().coalesce()
        kept_E = entries.values() != 0
        (pair_E, row_E), value_E = entries.indices()[:, kept_E], entries.values()[kept_E]

        label_P = _labels(pair_E, row_E, P, R)
        label_R = torch.full((R,), P).index_copy_(0, row_E, label_P[pair_E])  # P: a row without an entry
        order_P, order_R = label_P.argsort(stable=True), label_R.argsort(stable=True)
        by_pair_E = torch.empty_like(order_P).index_copy_(0, order_P, torch.arange(P))[pair_E].argsort(stable=True)
        by_row_E = torch.empty_like(order_R).index_copy_(0, order_R, torch.arange(R))[row_E].argsort(stable=True)
        structure = Structure(
            order_P=order_P,
            start_P=_starts(torch.bincount(pair_E, minlength=P)[order_P]),
            row_E=row_E[by_pair_E],
            value_E=value_E[by_pair_E],
            order_R=order_R,
            start_R=_starts(torch.bincount(row_E, minlength=R)[order_R]),
            pair_E=pair_E[by_row_E],
            coefficient_E=value_E[by_row_E],
        )
        label_K, count_K = label_P.unique(return_counts=True)
        rows_K = torch.bincount(label_R, minlength=P + 1)[label_K]
        entries_K = torch.bincount(label_P[pair_E], minlength=P)[label_K]
        num_used = int(rows_K.sum())
        return cls(
            structure=structure,
            component_K3=torch.stack([_starts(count_K), _starts(rows_K), _starts(entries_K)], dim=1),
            num_rows=R,
            num_used=num_used,
            in_order=num_used == R and torch.equal(order_R, torch.arange(R)),
        ).to(device)

    def to(self, device: torch.device | str) -> PairMatrix:
        """The same matrix with what kernels read on `device`; the CPU does not wait for it."""
        device = torch.device(device)

        def move(x: torch.Tensor) -> torch.Tensor:
            if device.type == "cuda" and x.device.type == "cpu":
                x = x.pin_memory()
            return x.to(device, non_blocking=True)

        return replace(self, structure=Structure(*map(move, self.structure)))


def _labels(pair_E: torch.Tensor, row_E: torch.Tensor, P: int, R: int) -> torch.Tensor:
    """For each pair the smallest pair of its component."""
    label_P = torch.arange(P)
    while True:
        label_R = torch.full((R,), P).scatter_reduce_(0, row_E, label_P[pair_E], "amin")
        new_P = label_P.scatter_reduce(0, pair_E, label_R[row_E], "amin")
        new_P = new_P[new_P]
        if torch.equal(new_P, label_P):
            return label_P
        label_P = new_P


def _starts(count_N: torch.Tensor) -> torch.Tensor:
    """Where each of N runs begins, and where the last one ends."""
    return torch.cat([count_N.new_zeros(1), count_N.cumsum(0)])
