"""The processes of one training run, as torchrun starts them, and how the policy is sharded over them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ttpa.errors import InputError

CPU = torch.device("cpu")
LONGEST_WAIT = timedelta(hours=2)  # for processes that are alive; of one that dies, the others learn at once


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
        """Go on when all processes have come to this place."""
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
def joined_world() -> Iterator[World]:
    """The processes of this run, by RANK, WORLD_SIZE and LOCAL_RANK of the environment.

    GPUs talk through NCCL, CPUs and small numbers through gloo. Without torchrun there is one process and no group; a
    group that is there already is used and left. Raises InputError where a node has more processes than GPUs.
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
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=LONGEST_WAIT)
    world = World(dist.get_rank(), size, device, grouped=True)
    try:
        yield world
        world.barrier()  # one that leaves while others still talk takes their connections with it
    finally:
        dist.destroy_process_group()


def make_mesh(world: World, *, shard_size: int | None) -> DeviceMesh:
    """The mesh of FSDP2: weights are sharded over groups of `shard_size` processes and replicated over the groups
    (HSDP); None shards over all, 1 replicates everywhere. Raises InputError for a size that does not divide the number
    of processes."""
    shard = world.size if shard_size is None else shard_size
    if world.size % shard:
        raise InputError(
            f"--shard_size {shard} does not divide the {world.size} processes of this run: give a divisor, or none to "
            "shard over all of them"
        )
    if shard == world.size:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (world.size // shard, shard)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard_policy(
    policy: nn.Module, blocks: list[nn.Module], *, mesh: DeviceMesh, bf16: bool, offload: bool = False
) -> None:
    """Shard a policy in place with FSDP2: each block is a unit, and all that is left, embedding, last norm and head, is
    the root's, whose forward must hold the whole computation.

    Gradients are sums over all processes, in fp32. With `bf16` blocks compute in bfloat16 on weights gathered in it;
    the shards stay as they are. With `offload` shards, gradients and optimizer states lie in CPU memory.
    """
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
    }
    for block in blocks:
        fully_shard(block, **options)  # type: ignore[call-overload]
    fully_shard(policy, **options)  # type: ignore[call-overload]
    for unit in policy.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            if mesh.device_type == "cpu":
                unit.set_force_sum_reduction_for_comms(True)  # gloo has no reduction with a factor before it
