"""Tile sizes and launch parameters of the Triton kernels, one row an architecture (sm_80, sm_90, sm_100)."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """A tile of a product `[M, N]` with inner dimension stepped by K, and how a program computes it."""

    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int


class LogitTile(NamedTuple):
    """A `Tile` of logits [rows, vocabulary], whose columns are turned into exponentials and sums a `strip` at a time.
    The targets' logits are computed `target_rows` at a time."""

    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int
    strip: int
    target_rows: int


# Half precision through tensor descriptors, and with pointers where rows are not aligned or there are no descriptors.
# The wide ones, for statistics and softcaps, leave registers for more after the product; they must divide the columns
# of a strip among threads as the others do, see `linear_logp.kernel._tile`.
LINEAR_LOGP = {
    90: LogitTile(128, 256, 64, 8, 4, strip=128, target_rows=64),
    100: LogitTile(128, 128, 64, 8, 4, strip=128, target_rows=64),
}
LINEAR_LOGP_WIDE = {
    90: LogitTile(128, 128, 64, 8, 4, strip=128, target_rows=64),
    100: LogitTile(128, 128, 64, 8, 4, strip=128, target_rows=64),
}
LINEAR_LOGP_POINTERS = dict.fromkeys((80, 90, 100), LogitTile(128, 128, 32, 8, 4, strip=128, target_rows=64))
LINEAR_LOGP_POINTERS_WIDE = LINEAR_LOGP_POINTERS | {80: LogitTile(64, 128, 32, 8, 4, strip=128, target_rows=64)}
# fp32 is multiplied exactly, outside the matrix units.
LINEAR_LOGP_FP32 = dict.fromkeys((80, 90, 100), LogitTile(64, 64, 32, 4, 2, strip=64, target_rows=32))


class Sweep(NamedTuple):
    """A program of tree attention holds `own` tokens and walks over the others, `step` at a time."""

    own: int
    step: int
    num_warps: int
    num_stages: int


# By the width of a head (64 stands for all below): forward, gradient of keys and values, gradient of queries.
# 16 rows of `own` to a warp: with more warps than that a product whose result feeds another one is computed twice.
TREE_ATTENTION = {
    80: {
        64: (Sweep(128, 64, 8, 3), Sweep(128, 32, 8, 2), Sweep(128, 64, 8, 3)),
        128: (Sweep(128, 32, 8, 2), Sweep(128, 16, 8, 3), Sweep(128, 32, 8, 3)),
        256: (Sweep(64, 16, 4, 2), Sweep(64, 16, 8, 2), Sweep(64, 16, 4, 2)),
    },
    90: {
        64: (Sweep(128, 128, 8, 3), Sweep(128, 64, 8, 3), Sweep(128, 64, 8, 3)),
        128: (Sweep(128, 128, 8, 2), Sweep(128, 64, 8, 2), Sweep(128, 64, 8, 2)),
        256: (Sweep(128, 64, 8, 2), Sweep(128, 32, 8, 2), Sweep(128, 32, 8, 2)),
    },
    100: {
        64: (Sweep(128, 128, 8, 3), Sweep(128, 64, 4, 3), Sweep(128, 64, 8, 3)),
        128: (Sweep(128, 128, 8, 2), Sweep(128, 64, 8, 2), Sweep(128, 64, 8, 2)),
        256: (Sweep(128, 64, 8, 2), Sweep(128, 32, 8, 2), Sweep(128, 32, 8, 2)),
    },
}
_TREE_ATTENTION_FP32 = {
    64: (Sweep(32, 16, 8, 2), Sweep(32, 16, 8, 2), Sweep(32, 16, 8, 2)),
    128: (Sweep(32, 16, 8, 2), Sweep(32, 16, 8, 1), Sweep(32, 16, 8, 2)),
    256: (Sweep(16, 16, 8, 1), Sweep(32, 16, 8, 2), Sweep(32, 16, 8, 2)),
}
TREE_ATTENTION_FP32 = dict.fromkeys((80, 90, 100), _TREE_ATTENTION_FP32)

# Paged attention: `own` rows are the tokens of an item times the query heads of a key head, for items of one token and
# of several; they walk over the keys. By the width of a head, as above. Keys are loaded through page numbers, which are
# loaded before: with 5 stages two steps of keys are on their way, with fewer one.
_PAGED_ATTENTION = {
    64: (Sweep(16, 64, 4, 5), Sweep(64, 64, 4, 5)),
    128: (Sweep(16, 32, 4, 5), Sweep(64, 32, 4, 5)),
    256: (Sweep(16, 32, 4, 5), Sweep(64, 32, 8, 3)),
}
PAGED_ATTENTION = dict.fromkeys((80, 90, 100), _PAGED_ATTENTION)
_PAGED_ATTENTION_FP32 = {
    64: (Sweep(16, 32, 4, 5), Sweep(64, 16, 8, 5)),
    128: (Sweep(16, 16, 8, 5), Sweep(32, 16, 8, 5)),
    256: (Sweep(16, 16, 8, 5), Sweep(16, 16, 8, 5)),
}
PAGED_ATTENTION_FP32 = dict.fromkeys((80, 90, 100), _PAGED_ATTENTION_FP32)
PAGED_ATTENTION_SPLIT = 256  # keys that one item walks over; it is more where several tiles of tokens read them

# Two matrices of logits, of policy and reference, so a tile holds two accumulators.
LINEAR_KL = {
    80: Tile(64, 128, 32, 8, 4),
    90: Tile(128, 128, 64, 8, 3),
    100: Tile(128, 128, 64, 8, 3),
}
LINEAR_KL_FP16 = LINEAR_KL | {90: Tile(128, 64, 64, 8, 4)}  # the scale of its gradient takes registers
LINEAR_KL_FP32 = {
    80: Tile(64, 64, 32, 8, 2),
    90: Tile(64, 64, 32, 8, 2),
    100: Tile(64, 64, 32, 8, 2),
}

# What one program of the loss takes at a time, on every architecture.
TOKEN_DPO_ENTRIES = 512  # of a pair
TOKEN_DPO_PAIRS = 512  # of all pairs
TOKEN_DPO_ROWS = 128  # rows of a program


class SpanTile(NamedTuple):
    """A program of `next_token` takes N tokens of a row at a time, `steps` times."""

    N: int
    steps: int
    num_warps: int


# By the least M that holds all rows of a batch. Several programs fit on a multiprocessor: while one reduces its tile,
# the others keep the memory busy.
_NEXT_TOKEN = (Tile(16, 128, 64, 4, 4), Tile(32, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4))
NEXT_TOKEN = {80: (Tile(16, 128, 64, 8, 4), Tile(64, 64, 64, 8, 4)), 90: _NEXT_TOKEN, 100: _NEXT_TOKEN}
NEXT_TOKEN_SPAN = SpanTile(512, 16, 8)
