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


# Logits [rows, vocabulary]; fp32 inputs are multiplied exactly, outside the matrix units, in smaller tiles.
LINEAR_LOGP = {
    80: Tile(128, 128, 32, 8, 4),
    90: Tile(128, 256, 64, 8, 3),
    100: Tile(128, 256, 64, 8, 3),
}
LINEAR_LOGP_FP32 = {
    80: Tile(64, 64, 32, 4, 2),
    90: Tile(64, 64, 32, 4, 2),
    100: Tile(64, 64, 32, 4, 2),
}
