"""Less memory or less time for the activations of a decoder's blocks: checkpointing, compilation, offloading.

Each function puts something around the forward of every block, in place; values, gradients and the names of parameters
stay. Call `checkpoint_activations` first, then `compile_blocks`, then `offload_activations`, and shard last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

Checkpointing = Literal["none", "selective", "full"]


def checkpoint_activations(model: PreTrainedModel, mode: Checkpointing) -> None:
    """Compute the activations of each block again in the backward pass, to the same bits (Chen et al., arXiv
    1604.06174). `full` keeps only the input of a block. `selective` also keeps what takes longest for its size: the
    outputs of attention, and of matrix products `[T, K] [K, N]` with N <= K, whose `2 T K N` flops leave `T N` numbers;
    wide and low-rank ones, norms and activations are computed again. What was around the blocks before is taken off."""
    options: dict[str, Any] = {}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep)
    for block in _blocks(model):
        vars(block).pop("forward", None)
        if mode != "none":
            # passes draw no random numbers, so there is no state of a generator to go back to
            _wrap(block, checkpoint, use_reentrant=False, preserve_rng_state=False, **options)


_ATTENTION = {
    torch.ops.ttpa_kernels.tree_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


def _keep(_: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    keep = operator in _ATTENTION
    if operator in _PRODUCTS:
        K, N = arguments[-1].shape
        keep = N <= K
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(model: PreTrainedModel, *, backend: str = "inductor") -> None:
    """Compile each block as one graph with `torch.compile`: once for all blocks, and once more when the second pack
    shows that lengths differ. Passes without a tree, such as sampling, stay as they are, and so do packs that SDPA cuts
    into pieces of their own, which are those on a CPU."""
    for block in _blocks(model):
        _wrap(block, _compiled, compiled=torch.compile(block.forward, fullgraph=True, backend=backend))


def _compiled(forward: Callable[..., Any], *arguments: Any, compiled: Callable[..., Any], **options: Any) -> Any:
    tree = options.get("tree")
    return (forward if tree is None or tree.engine == "torch" else compiled)(*arguments, **options)


def offload_activations(model: PreTrainedModel) -> None:
    """Hold in the host's memory what blocks keep for the backward pass, weights excepted; under `full` checkpointing
    that is the input of each block. Copies go over the stream that computes, so that they add to its time."""
    for block in _blocks(model):
        _wrap(block, _offloaded, owner=block)


def _offloaded(forward: Callable[..., Any], *arguments: Any, owner: nn.Module, **options: Any) -> Any:
    weights = {parameter.untyped_storage().data_ptr() for parameter in owner.parameters()}

    def to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        if tensor.untyped_storage().data_ptr() in weights:
            return tensor.device, tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def from_host(kept: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        device, tensor = kept
        return tensor.to(device, non_blocking=True)

    with saved_tensors_hooks(to_host, from_host):
        return forward(*arguments, **options)


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    return list(model.get_decoder().layers)


def _wrap(block: nn.Module, around: Callable[..., Any], **options: Any) -> None:
    block.forward = functools.partial(around, block.forward, **options)  # type: ignore[method-assign]
