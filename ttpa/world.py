"""The processes of one run, as torchrun starts them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ttpa.errors import InputError

CPU = torch.device("cpu")
LONGEST_WAIT = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """This process is `rank` of `size`, 0 of 1 where there is no other; `device` is a GPU of its own, or the CPU.
    `grouped`: torchrun started it, alone or not, so that weights can be sharded."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    grouped: bool = False

    @property
    def main(self) -> bool:
        """Whether this process prints and writes what there is once."""
        return self.rank == 0

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sum over all processes of each value, in fp64; every process gives the same names in the same order."""
        if self.size == 1 or not values:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def any(self, condition: bool) -> bool:
        """Whether the condition holds in any process."""
        return self.sum({"": float(condition)})[""] > 0

    def barrier(self) -> None:
        """Go on when all processes have come to this place; raises RuntimeError where one of them has ended."""
        self.any(False)

    def share_text(self, text: str | None, *, source: int = 0) -> str:
        """The text of process `source`, in every process; the others' texts are not read."""
        assert text is not None or self.rank != source
        if self.size == 1:
            return text or ""
        data = torch.frombuffer(bytearray((text or "").encode("utf-8", "surrogatepass") + b"\n"), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        dist.broadcast(length, src=source)
        if self.rank != source:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, src=source)
        return data.numpy().tobytes().decode("utf-8", "surrogatepass")[:-1]

    def gather_texts(self, text: str) -> list[str]:
        """The texts of all processes, in their order, in every process."""
        return [self.share_text(text if rank == self.rank else None, source=rank) for rank in range(self.size)]


@contextmanager
def joined_world(*, longest_wait: timedelta = LONGEST_WAIT) -> Iterator[World]:
    """The processes of this run, by RANK, WORLD_SIZE and LOCAL_RANK of the environment.

    A process waits `longest_wait` for others that are alive; of one that ends it learns at once. GPUs talk through
    NCCL, CPUs and small numbers through gloo. Without torchrun there is one process and no group; a group that is there
    already is used and left. Raises InputError where a node has more processes than GPUs.
    """
    local, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise InputError(
            f"process {local} of this node has no GPU of its own, there are {torch.cuda.device_count()}: give torchrun "
            "--nproc-per-node as many processes as GPUs"
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield World(0, 1, device)
        return
    if dist.is_initialized():
        yield World(dist.get_rank(), size, device, grouped=True)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=longest_wait)
    world = World(dist.get_rank(), size, device, grouped=True)
    try:
        yield world
        world.barrier()  # one that leaves while others still talk takes their connections with it
    finally:
        # a sharded model and its hooks hold each other, and the group, whose threads abort a process that ends with it
        gc.collect()
        dist.destroy_process_group()
