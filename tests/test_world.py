"""The processes of a run: what they tell each other."""

from __future__ import annotations

import pytest
from ranks import run_ranks

from ttpa.errors import InputError
from ttpa.training.distributed import make_mesh
from ttpa.world import joined_world


def numbers_and_texts() -> None:
    with joined_world() as world:
        assert world.sum({"a": world.rank + 1.0, "b": 2.0}) == {"a": 3.0, "b": 4.0}
        assert world.any(world.rank == 1) and not world.any(False)
        assert world.share_text("größer\ud83d\n" if world.main else None) == "größer\ud83d\n"
        assert world.gather_texts(f"of {world.rank}" * world.rank) == ["", "of 1"]
        with pytest.raises(InputError, match="--shard_size 3 does not divide the 2 processes"):
            make_mesh(world, shard_size=3)
        assert make_mesh(world, shard_size=1).shape == (2, 1) and make_mesh(world, shard_size=None).shape == (2,)


def test_processes_share_numbers_and_texts():
    run_ranks(numbers_and_texts, 2)
    with joined_world() as alone:
        assert alone.sum({"a": 1.5}) == {"a": 1.5} and alone.share_text("x") == "x" and not alone.grouped
