"""The two passes of `linear_kl` over the heads, in chunks of rows.

R head rows, K of them kept, C rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch

from ttpa_kernels.engine import Engine
from ttpa_kernels.linear_kl.chunks import Heads, divergences, gradient_scale
from ttpa_kernels.linear_kl.plan import Layout, Needs, choose_kl_engine, choose_layout
from ttpa_kernels.numerics import add_product_, operand, product, wide


class Problem(NamedTuple):
    """Hidden states, the heads without their padding, what needs a gradient, and how the computation goes."""

    hidden_RH: torch.Tensor
    ref_hidden_RH: torch.Tensor
    heads: Heads
    needs: Needs
    layout: Layout

    @property
    def factor(self) -> float:
        """What turns D into the derivative in the raw logits of the policy."""
        return self.heads.logit_scale / self.heads.temperature / gradient_scale(operand(self.hidden_RH[:0]).dtype)


def prepare(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    ref_hidden_RH: torch.Tensor,
    ref_weight_VH: torch.Tensor | None,
    bias_V: torch.Tensor | None,
    ref_bias_V: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    vocab_size: int,
    budget_bytes: int | None,
    engine: Engine | None,
    needs: Sequence[bool],
) -> Problem:
    """The problem that the arguments of the operators pose."""
    if ref_weight_VH is None:
        ref_bias_V = bias_V
    R, H = hidden_RH.shape
    layout = choose_layout(
        R=R,
        H=H,
        V=vocab_size,
        dtype=hidden_RH.dtype,
        device=hidden_RH.device,
        needs=Needs(*needs),
        shared_head=ref_weight_VH is None,
        budget_bytes=budget_bytes,
        engine=choose_kl_engine(hidden_RH.device, hidden_RH.dtype, engine),
    )
    heads = Heads(
        weight_VH[:vocab_size].contiguous(),
        None if ref_weight_VH is None else ref_weight_VH[:vocab_size].contiguous(),
        None if bias_V is None else bias_V[:vocab_size].contiguous(),
        None if ref_bias_V is None else ref_bias_V[:vocab_size].contiguous(),
        *(logit_scale, softcap, temperature),
    )
    return Problem(hidden_RH, ref_hidden_RH, heads, Needs(*needs), layout)


def allocate(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`kl_R`; its gradient in the hidden states, in the wide dtype; and D of the rows that are kept. Not filled; what
    is not needed has no rows."""
    hidden_RH, (R, H) = problem.hidden_RH, problem.hidden_RH.shape
    kl_R = hidden_RH.new_empty(R, dtype=wide(hidden_RH.dtype))
    gradient_RH = hidden_RH.new_empty(R if problem.needs.hidden else 0, H, dtype=kl_R.dtype)
    V, dtype = problem.heads.weight_VH.shape[0], operand(hidden_RH[:0]).dtype
    return kl_R, gradient_RH, _matrix(hidden_RH, problem.layout.kept_rows, V, dtype)


def forward_pass(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `allocate` names."""
    kl_R, gradient_RH, D_KV = allocate(problem)
    problem = problem._replace(heads=problem.heads.operands())
    for rows, kl_C, D_CV in _chunks(problem, D_KV, start=0):
        kl_R[rows] = kl_C
        if problem.needs.hidden:
            product(D_CV, problem.heads.weight_VH, out=gradient_RH[rows]).mul_(problem.factor)
    return kl_R, gradient_RH, D_KV


def head_gradients(
    problem: Problem, grad_R: torch.Tensor, D_KV: torch.Tensor, dweight_VH: torch.Tensor, dbias_V: torch.Tensor
) -> None:
    """Fill the gradients of weight and bias (without rows: not needed), `D^T (g X)` and `D^T g`.

    Rows that were not kept are computed again. In fp16 the factor g X is brought to where fp16 has most digits.
    """
    hidden_RH, (R, K), V = problem.hidden_RH, (len(grad_R), len(D_KV)), len(problem.heads.weight_VH)
    dtype, factor_dtype = wide(hidden_RH.dtype), D_KV.dtype
    factor_R = grad_R * problem.factor
    unit = None
    if R and factor_dtype == torch.float16:
        unit = factor_R.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        factor_R = factor_R / unit
    sums = []
    for gradient_VX, inputs_RX in ((dweight_VH, hidden_RH), (dbias_V[:, None], torch.ones_like(hidden_RH[:, :1]))):
        gradient_VX[V if R else 0 :] = 0
        if R and len(gradient_VX):
            gradient_VX = gradient_VX[:V]
            rounds_once = K == R and gradient_VX.dtype == factor_dtype and unit is None
            in_place = gradient_VX.dtype == dtype or rounds_once
            sum_VX = gradient_VX if in_place else torch.empty_like(gradient_VX, dtype=dtype)
            sums.append((gradient_VX, sum_VX, inputs_RX))
    if len(D_KV) < R:
        problem = problem._replace(heads=problem.heads.operands())
    kept = [(slice(0, K), grad_R[:K], D_KV)] if K else []
    for rows, _, D_CV in chain(kept, _chunks(problem, D_KV, start=K)):
        for _, sum_VX, inputs_RX in sums:
            factor_CX = (inputs_RX[rows] * factor_R[rows, None]).to(factor_dtype)
            if rows.start:
                add_product_(sum_VX, D_CV.T, factor_CX)
            elif sum_VX.dtype == factor_dtype:
                torch.mm(D_CV.T, factor_CX, out=sum_VX)
            else:
                product(D_CV.T, factor_CX, out=sum_VX)
    for gradient_VX, sum_VX, _ in sums:
        if unit is not None:
            sum_VX *= unit
        if sum_VX is not gradient_VX:
            gradient_VX.copy_(sum_VX)


def _chunks(problem: Problem, D_KV: torch.Tensor, *, start: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Rows, `kl_C` and D (with a gradient) of the chunks from row `start` on; where D is not kept, the next chunk
    overwrites it."""
    hidden_RH, ref_hidden_RH, heads, needs, (engine, C, *_) = problem
    (R, K), V, dtype, gradient = (len(hidden_RH), len(D_KV)), len(heads.weight_VH), D_KV.dtype, any(needs)
    has_buffers = start < R and (gradient or (engine == "torch" and dtype == wide(dtype)))
    passing_CV = _matrix(hidden_RH, C if has_buffers and len(D_KV) < R else 0, V, dtype)
    other_CV = _matrix(hidden_RH, C if has_buffers else 0, V, dtype)
    for i in range(start, R, C):
        rows = slice(i, min(i + C, R))
        size = rows.stop - i
        D_CV = D_KV[rows] if i < K else passing_CV[:size]
        kl_C = divergences(
            heads,
            operand(hidden_RH[rows]).contiguous(),
            operand(ref_hidden_RH[rows]).contiguous(),
            engine=engine,
            gradient=gradient,
            buffers=(D_CV, other_CV[:size]) if has_buffers else None,
        )
        yield rows, kl_C, D_CV


def _matrix(like: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A matrix whose rows begin at multiples of 16 elements, as tensor descriptors and fast products want them."""
    return like.new_empty(rows, -(-columns // 16) * 16, dtype=dtype)[:, :columns]
