"""Which components go through the head together, so that their exponentials fit into the budget.

R head rows, V vocabulary, H hidden size, A rank of the adapter, X one of H and A, K components of the pairs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

import torch

from ttpa_kernels.engine import Engine, choose_engine
from ttpa_kernels.linear_logp.chunks import COPY_BYTES, GPU_PART_BYTES, PART_BYTES
from ttpa_kernels.linear_logp.plan import (
    CHUNK_BYTES,
    DEFAULT_BUDGET_BYTES,
    NEEDS,
    ROW_NUMBERS,
    TEMPORARIES,
    Need,
    kept_dtype,
)
from ttpa_kernels.numerics import wide
from ttpa_kernels.token_dpo.pairs import PairMatrix
from ttpa_kernels.token_dpo.segments import Part

LEAST_ROWS = 512  # of a block, where the default budget decides
ALIGNMENT = 64  # rows of exponentials on a GPU begin where tensor descriptors and cuBLAS want them to


class Group(NamedTuple):
    """Components that are computed together.

    `kept`: exponentials of the first `kept_rows` rows stay until the gradients of the rows are known, those of the
    others are computed twice. `signed`: one pair, whose gradient of the head is known up to one number while its rows
    pass. `passing`: the head gets no gradient, rows pass.
    """

    kind: Literal["kept", "signed", "passing"]
    part: Part
    kept_rows: int = 0


class Plan(NamedTuple):
    """How the operation runs. `units` counts the products of `2 rows V H` flops, `rows` those with a coefficient;
    `workspace_bytes` bounds what is held beyond inputs, results and gradients; at most `block_rows` rows have their
    exponentials in memory, `chunk_rows` are computed at a time; `sums` is the number of fp32 (fp64) copies of the
    head's gradient."""

    engine: Engine
    units: float
    rows: int
    workspace_bytes: int
    groups: list[Group]
    block_rows: int
    chunk_rows: int
    sums: int


def plan(
    *,
    pairs: PairMatrix,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    needs: Collection[Need] = (),
    adapter_rank: int = 0,
    online: bool = False,
    budget_bytes: int | None = None,
    engine: Engine | None = None,
) -> Plan:
    """How `linear_token_dpo` will run for these pairs, H, V and an adapter of rank A; `needs` names what gets a
    gradient, `online` says that the reference is computed from hidden states of the same size.

    Units: 1 forward, 1 for the gradient of `hidden`, 1 for that of `weight`, 1 for the reference, and the share of
    rows in components of several pairs that do not fit into `budget_bytes` (None: DEFAULT_BUDGET_BYTES,
    or more where the least that works is more). Rows without a coefficient cost nothing. Products with the adapter
    are small and not counted. Nothing is read from the device. Raises ValueError for an unknown need, an engine that
    the device cannot run, and a budget below the least that works.
    """
    unknown = sorted(set(needs) - set(NEEDS))
    if unknown:
        raise ValueError(f"needs holds {', '.join(map(repr, unknown))}: give some of {', '.join(NEEDS)}")
    return choose_plan(
        pairs.component_K3.tolist(),
        R=pairs.num_rows,
        in_order=pairs.in_order,
        V=vocab_size,
        H=hidden_size,
        A=adapter_rank,
        dtype=dtype,
        device=torch.device(device),
        needs=needs,
        online=online,
        budget_bytes=budget_bytes,
        engine=choose_engine(torch.device(device), engine),
    )


def choose_plan(
    starts: list[list[int]],
    *,
    R: int,
    in_order: bool,
    V: int,
    H: int,
    A: int,
    dtype: torch.dtype,
    device: torch.device,
    needs: Collection[Need],
    online: bool,
    budget_bytes: int | None,
    engine: Engine,
) -> Plan:
    """`plan` for the lines of `PairMatrix.component_K3`."""
    kind, rows, X, w = "cpu" if device.type == "cpu" else "cuda", starts[-1][1], H + A, wide(dtype).itemsize
    e = w if kind == "cpu" else dtype.itemsize  # of a factor of a product
    half, converts = dtype.itemsize < w, dtype.itemsize < e
    head_columns = ("weight" in needs) * H + ("adapter" in needs) * A + ("bias" in needs)
    head_bytes = V * head_columns * w

    # Bytes: of a row with its exponentials and what the products with them make of it; of a chunk's logits beside its
    # exponentials; and of everything that does not depend on the size of blocks.
    row_bytes = (row_length(V, device) * e if needs or (engine == "torch" and e == w) else 0) + X * (w + e)
    row_bytes += V * w // 16 if engine == "triton" else 0  # what it holds of every tile
    beside_row = (V * w if engine == "torch" and e < w else 0) + (2 * X * w if converts else 0)
    part_bytes = TEMPORARIES * max(V * w, PART_BYTES if kind == "cpu" else GPU_PART_BYTES)
    fixed = R * ROW_NUMBERS * w + (min(V * X * w, max(X * w, COPY_BYTES)) if converts else 0)
    if not in_order:
        fixed += rows * (X + online * H) * dtype.itemsize
    if needs and kept_dtype(dtype) != dtype:
        fixed += R * X * kept_dtype(dtype).itemsize
    if dtype == torch.float16:
        fixed += head_bytes  # a part of the sum before it is scaled

    def chunk_bytes(chunk: int) -> int:
        return chunk * beside_row + (min(TEMPORARIES * chunk * V * w, part_bytes) if engine == "torch" else 0)

    def least(chunk: int) -> int:
        return fixed + chunk_bytes(chunk) + chunk * row_bytes + (head_bytes if half else 0)

    budget = max(DEFAULT_BUDGET_BYTES[kind], least(min(rows, LEAST_ROWS))) if budget_bytes is None else budget_bytes
    if budget < least(min(rows, 1)):
        raise ValueError(
            f"budget_bytes is {budget}, and {rows} rows with a vocabulary of {V} need {least(1)} at the least: raise "
            "it, or give fewer rows at a time"
        )
    chunk = max(1, min(rows, CHUNK_BYTES[kind] // (V * e + beside_row)))
    while chunk > 1 and least(chunk) > fixed + (budget - fixed) // 2:
        chunk //= 2
    if head_bytes and chunk_bytes(chunk) == 0:
        chunk = max(1, rows)  # nothing lies beside the exponentials, so a chunk is a block

    def capacity(sums: int) -> int:
        """Rows that have their exponentials in memory beside so many sums of the head's gradient."""
        return (budget - fixed - chunk_bytes(chunk) - sums * head_bytes) // max(row_bytes, 1)

    whole = _part(starts, 0, len(starts) - 1)
    again = 0
    if not head_bytes or not rows:
        groups, sums, block = [Group("passing", whole)], 0, min(chunk, rows)
    elif rows <= capacity(0):
        groups, sums, block = [Group("kept", whole, rows)], 0, rows
    else:
        sums = int(half)
        block = capacity(sums)
        groups, again = _stream(starts, block, max_signed=1)
        with_own = capacity(sums + 1)
        if again and with_own >= max(1, block // 4):
            more, less_again = _stream(starts, with_own, max_signed=len(starts))
            if less_again < again:
                groups, again, block, sums = more, less_again, with_own, sums + 1
        block = min(block, max(group.part.rows.stop - group.part.rows.start for group in groups))
    units = 1.0 + ("hidden" in needs) + ("weight" in needs) + online + (again / rows if rows else 0)
    workspace = fixed + chunk_bytes(chunk) + sums * head_bytes + block * row_bytes
    return Plan(engine, units, rows, workspace, groups, block, min(chunk, max(block, 1)), sums)


def row_length(V: int, device: torch.device) -> int:
    """Numbers from one row of exponentials to the next."""
    return V if device.type == "cpu" else -(-V // ALIGNMENT) * ALIGNMENT


def _stream(starts: list[list[int]], block: int, *, max_signed: int) -> tuple[list[Group], int]:
    """Groups of neighbouring components of at most `block` rows together, and the rows that are computed twice.

    Of the components that are too large themselves, the first `max_signed` that are one pair are signed; they come
    first, because the sum of the first one is scaled in place.
    """
    signed: list[Group] = []
    others: list[Group] = []
    first, again = 0, 0

    def close(last: int) -> None:
        if last > first:
            part = _part(starts, first, last)
            others.append(Group("kept", part, part.rows.stop - part.rows.start))

    for k in range(len(starts) - 1):
        part = _part(starts, k, k + 1)
        size = part.rows.stop - part.rows.start
        if size > block:
            close(k)
            first = k + 1
            if part.pairs.stop - part.pairs.start == 1 and len(signed) < max_signed:
                signed.append(Group("signed", part))
            else:
                others.append(Group("kept", part, block))
                again += size - block
        elif part.rows.stop - starts[first][1] > block:
            close(k)
            first = k
    close(len(starts) - 1)
    return signed + others, again


def _part(starts: list[list[int]], first: int, last: int) -> Part:
    return Part(*(slice(starts[first][i], starts[last][i]) for i in range(3)))
