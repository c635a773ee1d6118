"""How the policy is sharded over the processes of a training run."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ttpa.errors import InputError
from ttpa.world import World


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
