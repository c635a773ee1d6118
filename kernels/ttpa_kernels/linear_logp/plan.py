"""What an operation on the head will cost: engine, products, bytes, and how many rows are not computed twice."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

import torch

from ttpa_kernels.engine import Engine, choose_engine
from ttpa_kernels.linear_logp.chunks import COPY_BYTES, GPU_PART_BYTES, PART_BYTES
from ttpa_kernels.numerics import wide

Need = Literal["hidden", "weight", "bias", "adapter"]
Keeps = Literal["nothing", "gradient", "exponentials"]

NEEDS: tuple[Need, ...] = ("hidden", "weight", "bias", "adapter")
DEFAULT_BUDGET_BYTES = {"cpu": 120 << 20, "cuda": 3 << 30}
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # exponentials of a chunk of rows in the forward pass
TILE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}  # logits that are computed again together in the backward pass
TEMPORARIES = 3  # matrices of a part of the logits that its elementwise steps hold beside it; 1 without statistics
ROW_NUMBERS = 24  # numbers of a row that are no matrix: sums, factors, upstream gradients


class Plan(NamedTuple):
    """How an operation runs. `units` counts the products of `2 R V H` flops of both passes; `workspace_bytes` bounds
    what it holds beyond inputs, results and gradients; the forward pass takes `chunk_rows` rows at a time, and the
    logits of all but the first `kept_rows` rows are computed again in the backward pass."""

    engine: Engine
    units: float
    workspace_bytes: int
    chunk_rows: int
    kept_rows: int


def plan(
    *,
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    needs: Collection[Need] = (),
    adapter_rank: int = 0,
    stats: bool = False,
    budget_bytes: int | None = None,
    engine: Engine | None = None,
) -> Plan:
    """How `linear_logp` (with `stats`: `linear_logp_stats`) will run for R rows, H, V and an adapter of rank A.

    `needs` names what gets a gradient. Units: 1 forward, 1 for the gradient of `hidden`, 1 for that of `weight`, and
    where the head is trained (weight, bias or adapter) the share of rows whose exponentials, `V` numbers a row in the
    dtype of the products, do not fit into `budget_bytes` (None: DEFAULT_BUDGET_BYTES, or the least that works where
    that is more). Products with the adapter are small and not counted. Where the entropy or the log-sum-exp gets a
    gradient all rows are computed again, which adds a unit that is not in the plan. Raises ValueError for an unknown
    need, an engine that the device cannot run, and a budget below the least that works.
    """
    unknown = sorted(set(needs) - set(NEEDS))
    if unknown:
        raise ValueError(f"needs holds {', '.join(map(repr, unknown))}: give some of {', '.join(NEEDS)}")
    device = torch.device(device)
    layout = choose_layout(
        R=num_rows,
        V=vocab_size,
        X=hidden_size + adapter_rank,
        dtype=dtype,
        device=device,
        keeps="nothing" if not needs else "gradient" if set(needs) == {"hidden"} else "exponentials",
        stats=stats,
        budget_bytes=budget_bytes,
        engine=head_engine(device, dtype, engine),
    )
    units = 1.0 + ("hidden" in needs) + ("weight" in needs)
    if num_rows:
        units += 1 - layout.kept_rows / num_rows
    return Plan(layout.engine, units, layout.workspace_bytes, layout.chunk_rows, layout.kept_rows)


def head_engine(device: torch.device, dtype: torch.dtype, engine: Engine | None = None) -> Engine:
    """`choose_engine` for a head in `dtype`: fp64 is for the engine 'torch', and ValueError says so."""
    if dtype != torch.float64:
        return choose_engine(device, engine)
    if engine == "triton":
        raise ValueError("engine='triton' does not compute in torch.float64: use engine='torch'")
    return choose_engine(device, "torch" if engine is None else engine)


class Layout(NamedTuple):
    """The sizes of a run: those of `Plan`; rows, or in half precision tokens of the vocabulary, whose logits are
    computed again together; and whether the forward pass converts a half-precision head once, not for every chunk."""

    engine: Engine
    chunk_rows: int
    kept_rows: int
    again_size: int
    converts_once: bool
    workspace_bytes: int


def choose_layout(
    *,
    R: int,
    V: int,
    X: int,
    dtype: torch.dtype,
    device: torch.device,
    keeps: Keeps,
    stats: bool,
    budget_bytes: int | None,
    engine: Engine,
) -> Layout:
    """The layout for R rows and V tokens, X the hidden size and the adapter's rank together. R may be symbolic.

    The chunks do not depend on what is kept, so that results are the same to the bit with and without a gradient.
    """
    kind = "cpu" if device.type == "cpu" else "cuda"
    budget = DEFAULT_BUDGET_BYTES[kind] if budget_bytes is None else budget_bytes
    w = wide(dtype).itemsize
    e = w if kind == "cpu" else dtype.itemsize  # of a factor of a product
    half, converts = dtype.itemsize < w, dtype.itemsize < e
    part_bytes, temporaries = PART_BYTES if kind == "cpu" else GPU_PART_BYTES, TEMPORARIES if stats else 1

    # Forward pass: C rows hold E, logits where these are wider, converted inputs, and products with the head.
    E_row = row_stride(V) * e
    beside_row = (V * w if engine == "torch" and e < w else 0) + X * w * (2 if converts else 1)
    if engine == "triton":  # partial results of every strip: sums and their references, more with statistics
        beside_row += (7 if stats else 2) * w * (V // (128 if half else 64) + 1)
    space = min(CHUNK_BYTES[kind], max(budget // 2 - TEMPORARIES * part_bytes, budget // (2 + 2 * TEMPORARIES)))
    C = max(1, space // (E_row + beside_row))
    C = C // 128 * 128 or C // 16 * 16 or C
    rows = min(C, R)
    converts_once = converts and engine == "torch" and V * X * w <= budget // 4
    forward = rows * beside_row
    if converts:
        forward += V * X * w if converts_once else min(V * X * w, max(X * w, COPY_BYTES))
    if engine == "torch":
        forward += temporaries * min(rows * V * w, max(V * w, part_bytes))

    # Backward pass: logits that are computed again, of a chunk of rows, or (half precision) of a block of the
    # vocabulary for all rows, with that block of the head and of its gradient in fp32.
    vectors = ROW_NUMBERS * w
    if half:
        unit = R * (w + (e if e < w else 0)) + 2 * X * w
        again_row = vectors + X * (w + e)
    else:
        unit = (row_stride(V) + 2 * X) * w
        again_row = vectors
    tile_bytes = max(unit, min(TILE_BYTES[kind], budget // 8))
    again_size = tile_bytes // unit if R else 1
    again = tile_bytes + temporaries * min(tile_bytes, part_bytes) + R * again_row

    if keeps == "exponentials":
        kept_row = vectors + E_row + X * (e + w)
        in_blocks = half and (converts or dtype == torch.float16)
        most = max(forward, again if stats else tile_bytes if in_blocks else 0) + R * kept_row
        least = max(forward + rows * E_row, again)
    else:
        kept_row = vectors + (X * kept_dtype(dtype).itemsize if keeps == "gradient" else 0)
        if keeps == "gradient" or engine == "torch":
            forward += rows * E_row
        most = least = (max(forward, again) if stats and keeps == "gradient" else forward) + R * kept_row
    if budget < min(most, least):
        if budget_bytes is not None:
            raise ValueError(
                f"budget_bytes is {budget}, and {R} rows with a vocabulary of {V} need {min(most, least)}: raise it, "
                "or give fewer rows at a time"
            )
        budget = min(most, least)
    kept_rows, workspace = R, most
    if most > budget:
        # Chunks of rows that are not kept pass through the memory of those that are.
        kept_rows = max(0, budget - max(forward, again)) // kept_row
        kept_rows = kept_rows // C * C if half or kept_rows < C else kept_rows
        workspace = max(forward, again) + kept_rows * kept_row if kept_rows else least
    return Layout(engine, C, kept_rows, again_size, converts_once, workspace)


def row_stride(V: int) -> int:
    """Elements from a row of exponentials to the next, so that rows begin where GPUs load and store them best."""
    return (V + 7) // 8 * 8


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of an input gradient before it is scaled by the upstream gradient: fp16 would lose small ones."""
    return torch.float32 if dtype == torch.float16 else dtype
