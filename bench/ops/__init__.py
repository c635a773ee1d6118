"""The cases of each operation, by name: `cases(size)` with the sizes of SIZES."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Literal, get_args

from bench.measure import Case

Size = Literal["toy", "cpu", "gpu", "errors"]
SIZES: tuple[Size, ...] = get_args(Size)  # "errors" is small enough for fp64 and not timed
OPS = ("linear_logp", "linear_token_dpo", "token_dpo", "linear_kl", "next_token", "tree_attention")


def cases(op: str, size: Size) -> list[Case]:
    """The cases of one operation, the most important first."""
    found: list[Case] = importlib.import_module(f"bench.ops.{op}").cases(size)
    # fp64 at full size takes longer than all else
    return [dataclasses.replace(case, reference=None) for case in found] if size == "gpu" else found
