"""Precision: what products are accumulated in, and in which dtype their factors stand."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results and accumulators: fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand(x: torch.Tensor) -> torch.Tensor:
    """A factor as `product` takes it: GPUs multiply half precision into fp32 accumulators, CPUs need fp32 factors."""
    return x if x.is_cuda else x.to(wide(x.dtype))


def product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """`a @ b` of two operands in the wide dtype, also where autocast would round it; written to `out` where given."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == wide(a.dtype):
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=torch.float32) if out is None else torch.mm(a, b, torch.float32, out=out)


def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`total += a @ b` of two operands, with `total` in the wide dtype."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == total.dtype:
            return total.addmm_(a, b)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of Triton's `dot`: fp32 is multiplied exactly; for half precision the choice has no effect."""
    return "ieee" if dtype == torch.float32 else "tf32"
