"""Attention over packed trees: what the engines share, checks and dispatch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ttpa_kernels.engine import choose_engine
from ttpa_kernels.tree_attention import sdpa
from ttpa_kernels.tree_attention.blocks import BlockLists, block_lists

Engine = Literal["triton", "flex", "torch"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the Triton kernels
MAX_WIDTH = 256


@dataclass(frozen=True, eq=False)
class TreeMask:
    """What an engine needs to know of a pack, made once for all layers by `tree_mask`."""

    engine: Engine
    num_tokens: int
    pack: Any  # BlockLists for 'triton', FlexAttention's BlockMask for 'flex', a tuple of sdpa.Span for 'torch'


def tree_mask(end_T: torch.Tensor, *, engine: Engine | None = None) -> TreeMask:
    """The rule `token i sees key j iff j <= i < end_T[j]` of a pack of T tokens, prepared for `tree_attention`.

    `end_T` (int64 or int32) holds the packed index at which the subtree of each token ends, so `j < end_T[j] <= T`.
    Engines: 'triton' (GPUs of compute capability 8.0 and above), 'flex' (FlexAttention; on a CPU forward only),
    'torch' (SDPA; anywhere); None lets the device decide. On a GPU the first two make their lists without a host
    sync, and `end_T` is checked on the CPU only; 'torch' reads it on the host. Raises ValueError or TypeError.
    """
    if engine != "flex":
        engine = choose_engine(end_T.device, engine)
    if end_T.ndim != 1 or not len(end_T):
        raise ValueError(f"end_T {tuple(end_T.shape)} must hold one index for each token of a pack that is not empty")
    if end_T.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"end_T is {end_T.dtype}: convert it to torch.int64")
    T = len(end_T)
    if end_T.device.type == "cpu":
        index_T = torch.arange(T)
        wrong = ((end_T <= index_T) | (end_T > T)).nonzero()
        if len(wrong):
            j = int(wrong[0])
            raise ValueError(f"end_T[{j}] is {int(end_T[j])}: the subtree of token {j} must end in [{j + 1}, {T}]")
    if engine == "torch":
        return TreeMask(engine, T, sdpa.spans(end_T))
    lists = block_lists(end_T)
    if engine == "triton":
        return TreeMask(engine, T, lists)
    from ttpa_kernels.tree_attention import flex

    return TreeMask(engine, T, flex.block_mask(lists))


def tree_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: TreeMask, *, scale: float | None = None
) -> torch.Tensor:
    """`out[n, i] = sum_j P_ij v[j]`, `P_i = softmax_j(scale q[n, i] k[j])` over the tokens j that i sees.

    query `[1, N, T, D]`, key and value `[1, G, T, D]` with N a multiple of G: query head n reads key head `n G // N`.
    fp32, bf16 or fp16 (autocast is followed), D up to 256 with Triton, any strides; scale, positive, is `D ** -0.5`
    unless given. Products and softmax accumulate in fp32. Returns `[1, N, T, D]` over memory `[1, T, N, D]`, so that
    `.transpose(1, 2)` is contiguous. Differentiable in query, key and value, deterministic with 'triton'. Raises
    ValueError or TypeError. Online softmax and recomputation in the backward pass: Dao, arXiv 2307.08691.
    """
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    _check(query, key, value, mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}: give a positive number, or None for the width of a head ** -0.5")
    if mask.engine == "torch":
        return sdpa.attention(query, key, value, mask.pack, scale)
    if mask.engine == "flex":
        from ttpa_kernels.tree_attention import flex

        return flex.attention(query, key, value, mask.pack, scale)
    # kernels and tensor descriptors read rows of a head in one piece
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    block, *lists = mask.pack
    return _forward(query, key, value, *lists, block, scale)[0]


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: TreeMask) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4 or not len(query) == len(key) == len(value) == 1:
        raise ValueError(f"{shapes} must be [1, heads, T, D]: pack several sequences into one")
    if not query.shape[2] == key.shape[2] == value.shape[2] == mask.num_tokens:
        raise ValueError(f"{shapes} must have the {mask.num_tokens} tokens of the mask in their third dimension")
    if query.shape[3] != key.shape[3] or key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1]:
        raise ValueError(f"{shapes}: the width D must be equal, and the heads of the query a multiple of the others")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query is {query.dtype}, key {key.dtype}, value {value.dtype}: give all the same dtype")
    if not query.device == key.device == value.device:
        raise ValueError(f"query is on {query.device}, key on {key.device}, value on {value.device}: move them to one")
    if mask.engine == "triton":
        if query.dtype not in DTYPES:
            raise TypeError(f"query is {query.dtype}: give one of {', '.join(map(str, DTYPES))}, or engine='torch'")
        if key.shape[3] != value.shape[3] or key.shape[3] > MAX_WIDTH:
            raise ValueError(f"{shapes}: widths must be equal and at most {MAX_WIDTH}, or make the mask for 'torch'")


@torch.library.custom_op("ttpa_kernels::tree_attention", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    end_T: torch.Tensor,
    keys_BB: torch.Tensor,
    num_keys_2B: torch.Tensor,
    queries_BB: torch.Tensor,
    num_queries_2B: torch.Tensor,
    block: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    from ttpa_kernels.tree_attention import kernel

    lists = BlockLists(block, end_T, keys_BB, num_keys_2B, queries_BB, num_queries_2B)
    return kernel.forward(query, key, value, lists, scale)


@_forward.register_fake
def _(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    (_, _, _, keys_BB, *_, block, _) = rest
    lse_NT = query.new_empty((query.shape[1], len(keys_BB) * block), dtype=torch.float32)
    return _tokens_first(query), lse_NT


@torch.library.custom_op("ttpa_kernels::tree_attention_backward", mutates_args=())
def _backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse_NT: torch.Tensor,
    grad: torch.Tensor,
    end_T: torch.Tensor,
    keys_BB: torch.Tensor,
    num_keys_2B: torch.Tensor,
    queries_BB: torch.Tensor,
    num_queries_2B: torch.Tensor,
    block: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from ttpa_kernels.tree_attention import kernel

    lists = BlockLists(block, end_T, keys_BB, num_keys_2B, queries_BB, num_queries_2B)
    return kernel.backward(query, key, value, out, lse_NT, grad, lists, scale)


@_backward.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _tokens_first(query), _tokens_first(key), _tokens_first(value)


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor of the shape of `x` `[1, heads, T, D]` over memory `[1, T, heads, D]`."""
    return x.new_empty((1, x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.block, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    query, key, value, *lists, out, lse_NT = ctx.saved_tensors
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()  # what `sum` hands back, for one
    gradients = _backward(query, key, value, out, lse_NT, grad, *lists, ctx.block, ctx.scale)
    return *gradients, *[None] * (len(lists) + 2)


_forward.register_autograd(_differentiate, setup_context=_save)
