"""Triton kernels of `token_dpo`: one program a pair, one for the totals, one for a block of rows.

P pairs, R head rows, E entries. All arithmetic is in fp64: the kernels move a few numbers an entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ttpa_kernels.configs import TOKEN_DPO_ENTRIES, TOKEN_DPO_PAIRS, TOKEN_DPO_ROWS

if TYPE_CHECKING:
    from ttpa_kernels.ahead import Variant
    from ttpa_kernels.token_dpo.pairs import Structure
    from ttpa_kernels.token_dpo.segments import Loss, PairValues, Part


@triton.jit
def _softplus(x, tail):
    """`log(1 + e^x)` with `tail = e^-|x|`; what rounding takes from `1 + tail` is given back to the logarithm."""
    u = 1.0 + tail
    log1p = tl.where(u == 1.0, tail, tl.log(u) * (tail / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x < 0.0, 0.0, x) + log1p


@triton.jit
def _f(x, beta, smooth, LOSS: tl.constexpr):
    """`f(x)` and its derivative."""
    if LOSS == "hinge":
        f, slope = tl.where(x >= 1.0, 0.0, 1.0 - x), tl.where(x >= 1.0, 0.0, -1.0)
    elif LOSS == "ipo":
        y = (x - 0.5) / beta
        f, slope = y * y, 2.0 * y / beta
    elif LOSS == "linear":
        f, slope = -x, 0.0 * x - 1.0
    else:
        tail = tl.exp(-tl.abs(x))
        wrong, right = _softplus(-x, tail), _softplus(x, tail)  # -log sigmoid of x and of -x
        p_right = tl.where(x < 0.0, tail, 1.0) / (1.0 + tail)
        p_wrong = tl.where(x < 0.0, 1.0, tail) / (1.0 + tail)
        if LOSS == "sigmoid":
            f, slope = (1.0 - smooth) * wrong + smooth * right, smooth * p_right - (1.0 - smooth) * p_wrong
        else:
            share = 1.0 - 2.0 * smooth
            f = ((1.0 - smooth) * wrong - smooth * right) / share
            slope = (-smooth * p_right - (1.0 - smooth) * p_wrong) / share
    return f, slope


# The arrays of a part begin anywhere in those of the whole: one compiled kernel serves every place.
@triton.jit(do_not_specialize_on_alignment=["order_P", "start_P"])
def _pairs_kernel(
    order_P,
    start_P,
    row_E,
    value_E,
    logp_R,
    ref_logp_R,
    gamma_P,
    weight_P,
    margin_P,
    reward_P,
    loss_P,
    slope_P,
    beta_high,
    beta_low,
    smooth_high,
    smooth_low,
    denominator_high,
    denominator_low,
    LOSS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Margin, reward, loss and slope of one pair.

    Inputs: `order_P, start_P, row_E, value_E` (`Structure`), `logp_R`, and `ref_logp_R`, `gamma_P`, `weight_P` or None.
    Numbers come as sums of two fp32, which is how Triton passes them. Outputs: fp64 `margin_P, reward_P, loss_P,
    slope_P`. Grid: P. A program adds the entries of its pair, ENTRIES at a time, always in the same order.
    """
    program = tl.program_id(0)
    pair = tl.load(order_P + program)
    start, end = tl.load(start_P + program), tl.load(start_P + program + 1)
    beta = tl.full([], beta_high, tl.float64) + beta_low
    smooth = tl.full([], smooth_high, tl.float64) + smooth_low
    denominator = tl.full([], denominator_high, tl.float64) + denominator_low
    sums = tl.zeros([ENTRIES], dtype=tl.float64)
    for first in range(start, end, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        inside = entries < end
        rows = tl.load(row_E + entries, mask=inside, other=0)
        difference = tl.load(logp_R + rows, mask=inside, other=0.0).to(tl.float64)
        if ref_logp_R is not None:
            difference -= tl.load(ref_logp_R + rows, mask=inside, other=0.0).to(tl.float64)
        sums += tl.load(value_E + entries, mask=inside, other=0.0).to(tl.float64) * difference
    margin = tl.sum(sums, axis=0)
    reward = beta * margin
    x = reward
    if gamma_P is not None:
        x += tl.load(gamma_P + pair).to(tl.float64)
    f, slope = _f(x, beta, smooth, LOSS)
    if weight_P is not None:
        weight = tl.load(weight_P + pair).to(tl.float64)
        f, slope = f * weight, slope * weight
    tl.store(margin_P + pair, margin)
    tl.store(reward_P + pair, reward)
    tl.store(loss_P + pair, f / denominator)
    tl.store(slope_P + pair, slope * (beta / denominator))


@triton.jit(do_not_specialize=["P"])
def _totals_kernel(reward_P, loss_P, loss, means_2, P, PAIRS: tl.constexpr):
    """The loss, the mean reward and the share of rewards above 0.

    Inputs: fp64 `reward_P, loss_P`. Outputs: `loss`, one number, and fp64 `means_2`. Grid: 1. The program adds PAIRS
    pairs at a time, always in the same order.
    """
    total = tl.zeros([PAIRS], dtype=tl.float64)
    rewards = tl.zeros([PAIRS], dtype=tl.float64)
    right = tl.zeros([PAIRS], dtype=tl.float64)
    for first in range(0, P, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        reward = tl.load(reward_P + pairs, mask=pairs < P, other=0.0)
        total += tl.load(loss_P + pairs, mask=pairs < P, other=0.0)
        rewards += reward
        right += tl.where(reward > 0.0, 1.0, 0.0)
    count = tl.maximum(tl.full([], P, tl.float64), 1.0)
    tl.store(loss, tl.sum(total, axis=0).to(loss.dtype.element_ty))
    tl.store(means_2, tl.sum(rewards, axis=0) / count)
    tl.store(means_2 + 1, tl.sum(right, axis=0) / count)


@triton.jit(do_not_specialize=["Q"], do_not_specialize_on_alignment=["order_R", "start_R"])
def _rows_kernel(order_R, start_R, pair_E, coefficient_E, slope_P, upstream, out_R, Q, ROWS: tl.constexpr):
    """The gradient `sum_p C[p, r] slope_p` of ROWS rows.

    Inputs: `order_R, start_R, pair_E, coefficient_E` (`Structure`, from the first of Q rows on), fp64 `slope_P`, and
    `upstream`, one number, or None. Output: `out_R`. Grid: blocks of the Q rows. A lane adds up the entries of its row.
    """
    lanes = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.load(start_R + lanes, mask=lanes < Q, other=0)
    end = tl.load(start_R + lanes + 1, mask=lanes < Q, other=0)
    gradient = tl.zeros([ROWS], dtype=tl.float64)
    for step in range(0, tl.max(end - start, axis=0)):
        inside = start + step < end
        pairs = tl.load(pair_E + start + step, mask=inside, other=0)
        coefficient = tl.load(coefficient_E + start + step, mask=inside, other=0.0).to(tl.float64)
        gradient += coefficient * tl.load(slope_P + pairs, mask=inside, other=0.0)
    if upstream is not None:
        gradient *= tl.load(upstream).to(tl.float64)
    rows = tl.load(order_R + lanes, mask=lanes < Q, other=0)
    tl.store(out_R + rows, gradient.to(out_R.dtype.element_ty), mask=lanes < Q)


def pair_values_(
    out: PairValues,
    structure: Structure,
    part: Part,
    logp_R: torch.Tensor,
    ref_logp_R: torch.Tensor | None,
    loss: Loss,
    *,
    entries: int = TOKEN_DPO_ENTRIES,
) -> None:
    """`segments.pair_values_`."""
    num_pairs = part.pairs.stop - part.pairs.start
    if num_pairs == 0:
        return
    with torch.cuda.device_of(logp_R):  # Triton launches on the current device
        _pairs_kernel[(num_pairs,)](
            *(structure.order_P[part.pairs], structure.start_P[part.pairs.start :]),
            *(structure.row_E, structure.value_E, logp_R, ref_logp_R, loss.margin_P, loss.pair_weight_P),
            *out,
            *_halves(loss.beta),
            *_halves(loss.label_smoothing),
            *_halves(loss.denominator),
            LOSS=loss.loss_type,
            ENTRIES=entries,
        )


def row_gradients_(
    out_R: torch.Tensor,
    structure: Structure,
    part: Part,
    slope_P: torch.Tensor,
    *,
    upstream: torch.Tensor | None = None,
    rows: int = TOKEN_DPO_ROWS,
) -> None:
    """`segments.row_gradients_`."""
    num_rows = part.rows.stop - part.rows.start
    if num_rows == 0:
        return
    with torch.cuda.device_of(out_R):
        _rows_kernel[(triton.cdiv(num_rows, rows),)](
            *(structure.order_R[part.rows], structure.start_R[part.rows.start :]),
            *(structure.pair_E, structure.coefficient_E, slope_P, upstream, out_R, num_rows),
            ROWS=rows,
        )


def totals(
    values: PairValues, dtype: torch.dtype, *, pairs: int = TOKEN_DPO_PAIRS
) -> tuple[torch.Tensor, torch.Tensor]:
    """`segments.totals`."""
    loss, means_2 = values.loss_P.new_empty((), dtype=dtype), values.loss_P.new_empty(2)
    with torch.cuda.device_of(loss):
        _totals_kernel[(1,)](values.reward_P, values.loss_P, loss, means_2, len(values.loss_P), PAIRS=pairs)
    return loss, means_2


def _halves(number: float) -> tuple[float, float]:
    """Two numbers that fp32 holds, whose sum is `number` to 48 bits."""
    high = torch.tensor(number, dtype=torch.float32).item()
    return high, number - high


def variants(architecture: int) -> Iterator[Variant]:
    """Every loss function, and the kernels of totals and rows; the sizes are those of all architectures."""
    from ttpa_kernels.ahead import Variant

    del architecture
    indexes = {"order_P": "*i64", "start_P": "*i64", "row_E": "*i64"}
    results = dict.fromkeys(("margin_P", "reward_P", "loss_P", "slope_P"), "*fp64")
    numbers = {f"{name}_{half}": "fp32" for name in ("beta", "smooth", "denominator") for half in ("high", "low")}
    optional = {"ref_logp_R": "*fp32", "gamma_P": "*fp64", "weight_P": "*fp64"}
    inputs = indexes | {"value_E": "*fp64", "logp_R": "*fp32"} | results | numbers
    for loss_type in ("sigmoid", "robust", "hinge", "ipo", "linear"):
        constants = {"LOSS": loss_type, "ENTRIES": TOKEN_DPO_ENTRIES}
        yield Variant(f"token_dpo pairs {loss_type}", _pairs_kernel, inputs | optional, constants, 4, 1)
    absent = dict.fromkeys(optional) | {"LOSS": "sigmoid", "ENTRIES": TOKEN_DPO_ENTRIES}
    yield Variant("token_dpo pairs sigmoid plain", _pairs_kernel, inputs, absent, 4, 1)
    signature = {"reward_P": "*fp64", "loss_P": "*fp64", "loss": "*fp32", "means_2": "*fp64", "P": "i32"}
    yield Variant("token_dpo totals", _totals_kernel, signature, {"PAIRS": TOKEN_DPO_PAIRS}, 4, 1)
    signature = {"order_R": "*i64", "start_R": "*i64", "pair_E": "*i64", "coefficient_E": "*fp64", "slope_P": "*fp64"}
    signature |= {"upstream": "*fp32", "out_R": "*fp32", "Q": "i32"}
    yield Variant("token_dpo rows", _rows_kernel, signature, {"ROWS": TOKEN_DPO_ROWS}, 4, 1)
