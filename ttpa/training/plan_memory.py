"""The memory of a forward and a backward pass, from tensors that have shapes and no contents.

The decoder runs as in training, on fake tensors, while every tensor is followed from its birth to its end. The fused
head, of which fake tensors do not see the inside, takes what its own plan says.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from ttpa_kernels.linear_kl.plan import Needs as KlNeeds
from ttpa_kernels.linear_kl.plan import choose_layout as kl_layout
from ttpa_kernels.linear_logp.plan import Keeps, choose_layout, kept_dtype, row_stride
from ttpa_kernels.tree_attention.blocks import block_lists
from ttpa_kernels.tree_attention.op import TreeMask, tree_mask

from ttpa.model import head_weight
from ttpa.training.memory import Checkpointing, checkpoint_activations
from ttpa.trees.pack import TreeBatch

Kind = Literal["cpu", "cuda"]


class Peak(NamedTuple):
    """Bytes at the moment when a pass needs most, by what they hold, those of the pack and of its attention mask, and
    those that an offload moved to the CPU."""

    activations: int
    head: int
    gradients: int
    batch: int
    offloaded: int


@dataclass(frozen=True)
class PassOptions:
    """What decides the memory of a pass beside model and pack: the device, autocast in bf16, weights that are gathered
    for the pass in the dtype of its products and whose gradients leave at once (FSDP2), what is computed again, whether
    saved activations go to the CPU, whether the divergence from a reference is wanted, and whether gradients of an
    earlier pack are there already."""

    kind: Kind
    bf16: bool = False
    sharded: bool = False
    checkpointing: Checkpointing = "none"
    offload_activations: bool = False
    divergence: bool = False
    accumulates: bool = False


def pass_peak(model: PreTrainedModel, pack: TreeBatch, options: PassOptions) -> Peak:
    """The peak of a forward and a backward pass over a pack, beyond weights and optimizer states.

    The model has tree attention and may lie on the meta device; its weights are not read, and it stays as it is.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    mask = _mask(pack.end_T, options.kind)
    with fake:
        twin = _without_contents(model, torch.bfloat16 if options.bf16 and options.sharded else None)
        checkpoint_activations(twin, options.checkpointing)
        live = _Live(twin, drop_gradients=options.sharded)
        ids_T, position_T, end_T, row_R = (
            torch.empty(len(x), dtype=x.dtype) for x in (pack.ids_T, pack.position_T, pack.end_T, pack.row_R)
        )
        mask = TreeMask(mask.engine, mask.num_tokens, _shapes(mask.pack))
        # a gradient that is there already gets the next one added to it, for which both have to be there
        for _ in range(2 if options.accumulates and not options.sharded else 1):
            with live, live.offload() if options.offload_activations else nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                    hidden_TH = twin.get_decoder()(
                        input_ids=ids_T[None],
                        position_ids=position_T[None],
                        attention_mask=end_T[None, None, None],
                        tree=mask,
                        use_cache=False,
                    ).last_hidden_state[0]
                    dtype = torch.bfloat16 if options.bf16 else head_weight(twin).dtype
                    weight_VH = head_weight(twin).to(dtype)
                    rows_RH = hidden_TH.to(dtype)[row_R[: pack.num_trained]]
                    result = _head(twin, rows_RH, weight_VH, live, pack, options)
                del hidden_TH, rows_RH, weight_VH
                result.sum().backward()
                del result
    return Peak(
        activations=live.peak["activations"],
        head=live.peak["head"],
        gradients=live.peak["gradients"],
        batch=_num_bytes(tree_leaves([vars(pack), mask.pack])),
        offloaded=live.moved,
    )


class _Live(TorchDispatchMode):
    """Follows the storage of every tensor that comes out of an operation."""

    def __init__(self, model: nn.Module, *, drop_gradients: bool) -> None:
        super().__init__()
        self.bytes, self.peak = Counter[str](), Counter[str]()
        self.tag, self.moved = "activations", 0
        self._known: dict[int, tuple[Any, str]] = {}
        self._weights = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop if drop_gradients else self._is_gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor)
        if self.bytes.total() > self.peak.total():
            self.peak = Counter(self.bytes)
        return found

    def offload(self) -> AbstractContextManager[Any]:
        """What the backward pass keeps is not kept here, but for the weights themselves."""

        def pack(tensor: torch.Tensor) -> Any:
            if tensor.untyped_storage()._cdata in self._weights:
                return tensor
            self.moved += tensor.nbytes
            return tensor.shape, tensor.dtype

        def unpack(kept: Any) -> torch.Tensor:
            return kept if isinstance(kept, torch.Tensor) else torch.empty(kept[0], dtype=kept[1])

        return saved_tensors_hooks(pack, unpack)

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._weights:
            return

        def ended(_: Any) -> None:
            self.bytes[self._known.pop(key)[1]] -= size

        self._known[key] = weakref.ref(storage, ended), self.tag
        self.bytes[self.tag] += size

    def _is_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        reference, tag = self._known[storage._cdata]
        self.bytes[tag] -= storage.nbytes()
        self.bytes["gradients"] += storage.nbytes()
        self._known[storage._cdata] = reference, "gradients"


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _without_contents(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """A copy of a model, in another dtype if given, whose tensors have no contents; tied weights stay tied."""
    twins: dict[int, Any] = {}

    def twin(tensor: torch.Tensor) -> torch.Tensor:
        floating = dtype is not None and tensor.is_floating_point()
        empty = torch.empty(tensor.shape, dtype=dtype if floating else tensor.dtype, device="cpu")
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    for tensor in [*model.parameters(), *model.buffers()]:
        twins[id(tensor)] = twin(tensor)
    return copy.deepcopy(model, twins).train()


def _mask(end_T: torch.Tensor, kind: Kind) -> TreeMask:
    return tree_mask(end_T) if kind == "cpu" else TreeMask("triton", len(end_T), block_lists(end_T))


def _shapes(pack: Any) -> Any:
    """What a mask holds, with tensors that have no contents."""
    if isinstance(pack, torch.Tensor):
        return torch.empty(pack.shape, dtype=pack.dtype)
    if isinstance(pack, tuple):
        parts = [_shapes(part) for part in pack]
        return type(pack)(*parts) if hasattr(pack, "_fields") else tuple(parts)
    return pack


def _num_bytes(values: list[Any]) -> int:
    """Bytes of the tensors among values; a sparse one has two indexes of 8 bytes beside each number."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return sum(x._nnz() * (16 + x.dtype.itemsize) if x.is_sparse else x.nbytes for x in tensors)


def _head(
    model: PreTrainedModel,
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    live: _Live,
    pack: TreeBatch,
    options: PassOptions,
) -> torch.Tensor:
    """The results of the fused head for the trained rows, after which the reported rows went through it as well."""
    (R, H), V, dtype = hidden_RH.shape, len(weight_VH), hidden_RH.dtype
    device = torch.device(options.kind)
    trains = any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters())
    wide = 4 if options.kind == "cpu" else dtype.itemsize  # bytes of what is kept of a logit

    def workspace(rows: int, keeps: Keeps) -> tuple[int, int]:
        layout = choose_layout(
            R=rows,
            V=V,
            X=H,
            dtype=dtype,
            device=device,
            keeps=keeps,
            stats=False,
            budget_bytes=None,
            engine="triton" if options.kind == "cuda" else "torch",
        )
        kept = rows * H * kept_dtype(dtype).itemsize if keeps == "gradient" else 0
        if keeps == "exponentials":
            kept = layout.kept_rows * row_stride(V) * wide
        return layout.workspace_bytes, kept

    logp_R = _Fused.apply(hidden_RH, weight_VH, live, *workspace(R, "exponentials" if trains else "gradient"))
    if options.divergence:
        layout = kl_layout(
            R=R,
            H=H,
            V=V,
            dtype=dtype,
            device=device,
            needs=KlNeeds(True, trains, False),
            shared_head=False,
            budget_bytes=None,
            engine="torch",
        )
        reference_RH = torch.empty_like(hidden_RH)  # with a copy of the head, which its own row counts
        sizes = layout.workspace_bytes, layout.kept_rows * V * wide if trains else 0
        logp_R = logp_R + _Fused.apply(hidden_RH, weight_VH, live, *sizes) + 0 * reference_RH.sum()
    reported = len(pack.row_R) - R
    if reported:
        with _in_head(live):
            torch.empty(workspace(reported, "nothing")[0], dtype=torch.uint8)
    return logp_R


class _Fused(torch.autograd.Function):
    """An operation on the head that works in `workspace` bytes, `kept` of which it keeps for its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RH: torch.Tensor, weight_VH: torch.Tensor, live: _Live, workspace: int, kept: int
    ) -> torch.Tensor:
        with _in_head(live):
            ctx.kept = torch.empty(kept, dtype=torch.uint8)
            torch.empty(max(0, workspace - kept), dtype=torch.uint8)
        ctx.live, ctx.workspace = live, workspace
        ctx.save_for_backward(hidden_RH, weight_VH)
        return hidden_RH.new_empty(len(hidden_RH), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_R: torch.Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        gradients = [torch.empty_like(x) if needed else None for x, needed in zip(inputs, wanted, strict=True)]
        with _in_head(ctx.live):
            torch.empty(max(0, ctx.workspace - ctx.kept.nbytes), dtype=torch.uint8)
        del ctx.kept
        return *gradients, None, None, None


class _in_head:
    """Within, what is allocated counts as the head's."""

    def __init__(self, live: _Live) -> None:
        self.live = live

    def __enter__(self) -> None:
        self.live.tag = "head"

    def __exit__(self, *_: Any) -> None:
        self.live.tag = "activations"
