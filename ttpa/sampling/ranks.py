"""The processes of one run, as torchrun starts them: they share files, and wait for each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

LONGEST_WAIT = timedelta(days=7)  # for processes that are alive; of one that dies, the others learn at once


@dataclass(frozen=True)
class Ranks:
    """This process is `rank` of `world`, 0 of 1 where there is no other."""

    rank: int
    world: int

    @property
    def device(self) -> torch.device:
        """A GPU of this process's own, or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

    def wait(self) -> None:
        """Go on when all processes have come to this place; exits with an error where one of them has ended."""
        if self.world == 1:
            return
        try:
            dist.monitored_barrier(timeout=LONGEST_WAIT)
        except RuntimeError:
            raise SystemExit("error: another process of this run has ended: the same command goes on") from None


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes of this run, by RANK and WORLD_SIZE of the environment."""
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if world == 1:
        yield Ranks(0, 1)
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), world)
    finally:
        dist.destroy_process_group()
