"""What `linear_kl` will cost: engine, products, bytes, and how many rows are not computed twice."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

import torch

from ttpa_kernels.engine import Engine, choose_engine
from ttpa_kernels.linear_kl.chunks import PART_BYTES
from ttpa_kernels.linear_logp.plan import DEFAULT_BUDGET_BYTES, Plan
from ttpa_kernels.numerics import wide

Need = Literal["hidden", "weight", "bias"]

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # both matrices of logits of a chunk, engine 'torch'
CHUNK_ROWS = 1024  # engine 'triton': rows of a chunk whose results are not kept, where memory is short
TEMPORARIES = 6  # matrices of a part of the logits that the elementwise steps hold beside the logits


class Needs(NamedTuple):
    """Which inputs get a gradient."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        return self.weight or self.bias


class Layout(NamedTuple):
    """How a run goes: C rows at a time, D kept for the first `kept_rows` rows, and the bytes that this takes."""

    engine: Engine
    chunk_rows: int
    kept_rows: int
    workspace_bytes: int


def plan(
    *,
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    needs: Collection[Need] = (),
    shared_head: bool = True,
    budget_bytes: int | None = None,
    engine: Engine | None = None,
) -> Plan:
    """How `linear_kl` will run for R rows, H and V. `needs` names what gets a gradient; `budget_bytes` None stands for
    DEFAULT_BUDGET_BYTES, or the least that works where that is more. Units of `2 R V H` flops: 2 for the logits of
    policy and reference, 1 for the gradient of `hidden`, 1 for that of `weight`, and where the head is trained
    another 2 for the share of rows whose D (V numbers in the dtype of the products) is not kept. Raises ValueError
    for an unknown need, an engine that the device cannot run, and a budget below the least that works."""
    unknown = sorted(set(needs) - set(Needs._fields))
    if unknown:
        raise ValueError(f"needs holds {', '.join(map(repr, unknown))}: give some of {', '.join(Needs._fields)}")
    device = torch.device(device)
    needed = Needs(*(name in needs for name in Needs._fields))
    layout = choose_layout(
        R=num_rows,
        H=hidden_size,
        V=vocab_size,
        dtype=dtype,
        device=device,
        needs=needed,
        shared_head=shared_head,
        budget_bytes=budget_bytes,
        engine=choose_kl_engine(device, dtype, engine),
    )
    units = 2.0 + needed.hidden + needed.weight
    if needed.head and num_rows:
        units += 2 - 2 * layout.kept_rows / num_rows
    return Plan(layout.engine, units, layout.workspace_bytes, layout.chunk_rows, layout.kept_rows)


def choose_kl_engine(device: torch.device, dtype: torch.dtype, engine: Engine | None) -> Engine:
    """`choose_engine`, but PyTorch for fp64, which the Triton kernels do not take."""
    if dtype != torch.float64:
        return choose_engine(device, engine)
    if engine == "triton":
        raise ValueError("engine='triton' has no float64: use engine='torch', or give float32")
    return choose_engine(device, "torch")


def choose_layout(
    *,
    R: int,
    H: int,
    V: int,
    dtype: torch.dtype,
    device: torch.device,
    needs: Needs,
    shared_head: bool,
    budget_bytes: int | None,
    engine: Engine,
) -> Layout:
    """The layout for R rows. The chunks of the engine 'torch' do not depend on what needs a gradient, so that results
    are the same to the bit; those of the engine 'triton' may, because there a row does not see its chunk."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    budget = DEFAULT_BUDGET_BYTES[kind] if budget_bytes is None else budget_bytes
    w = wide(dtype).itemsize
    e = w if kind == "cpu" else dtype.itemsize  # of a factor of a product
    kept_row = -(-V // 16) * 16 * e
    fixed = R * (8 * w + (H * w if needs.hidden else 0))  # numbers of a row, the unscaled gradient of its hidden state
    if e > dtype.itemsize:
        fixed += (1 if shared_head else 2) * V * H * w
    # The sum over chunks of the weight's gradient, where it is not the gradient itself.
    sum_bytes = V * H * w if needs.weight and dtype.itemsize < w else 0
    row = 3 * H * w  # converted and scaled hidden states, and a product with the head
    if engine == "triton":
        from ttpa_kernels.linear_kl import kernel

        row += kernel.parts_bytes(V, dtype, device) + (2 * kept_row if any(needs) else 0)
        C = max(1, (budget - fixed) // row)
    else:
        row += 2 * (kept_row if e == w else V * w + kept_row)
        C = max(1, min(CHUNK_BYTES[kind], budget // 2) // row)
        fixed += TEMPORARIES * max(V * w, PART_BYTES[kind])
    C = _even(R, C)
    kept_rows, workspace = 0, fixed + C * row
    if needs.head:
        if engine == "triton":
            C = min(C, _even(R, CHUNK_ROWS))
        whole = fixed + R * kept_row + (sum_bytes if dtype == torch.float16 or kind == "cpu" else 0)
        if whole + C * (row - kept_row) <= budget:
            if engine == "triton":
                C = _even(R, (budget - whole) // (row - kept_row))
            kept_rows, workspace = R, whole + C * (row - kept_row)
        else:
            fixed += sum_bytes
            if engine == "triton":
                C = min(C, max(1, (budget - fixed) // row))
            kept_rows = max(0, budget - fixed - C * row) // kept_row // C * C
            workspace = fixed + C * row + kept_rows * kept_row
    if budget_bytes is not None and workspace > budget:
        least = max(fixed + row, 2 * fixed)
        raise ValueError(
            f"budget_bytes is {budget}, and {R} rows with a vocabulary of {V} need {least}: raise it, or give fewer "
            "rows at a time"
        )
    return Layout(engine, C, kept_rows, workspace)


def _even(R: int, C: int) -> int:
    """Rows of a chunk where R rows go in as few chunks of at most C rows as can be, all about as large."""
    if R <= C:
        return max(R, 1)
    chunks = -(-R // C)
    size = -(-R // chunks)
    return min(C, -(-size // 128) * 128)
