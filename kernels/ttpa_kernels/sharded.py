"""Heads whose weight is sharded over processes."""

from __future__ import annotations

from typing import overload

import torch


@overload
def whole(tensor: torch.Tensor, name: str) -> torch.Tensor: ...
@overload
def whole(tensor: None, name: str) -> None: ...
def whole(tensor: torch.Tensor | None, name: str) -> torch.Tensor | None:
    """The whole of a weight that may be a `DTensor`; its gradient comes back sharded, as the sum over all processes.

    This is data parallelism: every process of the mesh has rows of its own, so that its gradient is a part of a sum
    (FSDP2: one mesh dimension that shards; HSDP: one that shards and others that replicate). FSDP2 itself takes the
    mean over processes for the weights that it gathers; a module that calls the head inside the forward of the
    `fully_shard` unit that owns the weight never comes here, because there the weight is whole already. To mix both,
    let FSDP2 sum too, with `set_gradient_divide_factor(1.0)` on its units, and divide the loss by the number of pairs
    of all processes. Raises ValueError for a weight that several mesh dimensions shard (tensor parallelism beside FSDP,
    where processes share rows and a sum would count them twice) and for one that is a pending sum.
    """
    if tensor is None or type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if not isinstance(tensor, DTensor):
        return tensor
    sharding = [placement for placement in tensor.placements if not isinstance(placement, Replicate)]
    if len(sharding) > 1 or any(type(placement) is not Shard for placement in sharding):
        raise ValueError(
            f"{name} is a DTensor placed as {tensor.placements}: one mesh dimension may shard it (Shard) and others "
            "replicate it, with rows of its own on every process; gather other weights with full_tensor() first, and "
            "say there with grad_placements what their gradients mean"
        )
    return tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)


def refuse_sharded(**tensors: torch.Tensor | None) -> None:
    """ValueError for rows that are a `DTensor`: each process gives its own rows as plain tensors."""
    for name, tensor in tensors.items():
        if tensor is not None and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            from torch.distributed.tensor import DTensor

            if isinstance(tensor, DTensor):
                raise ValueError(f"{name} is a DTensor: give the rows of this process, {name}.to_local()")
