"""Divergence of a policy from its reference straight from hidden states and heads, without a matrix of logits.

R head rows, K of them kept for the backward pass, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from ttpa_kernels.checks import check_head, check_one_device
from ttpa_kernels.engine import Engine
from ttpa_kernels.linear_kl.passes import allocate, forward_pass, head_gradients, prepare
from ttpa_kernels.linear_kl.plan import Needs, choose_kl_engine
from ttpa_kernels.sharded import refuse_sharded, whole


def linear_kl(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    ref_hidden_RH: torch.Tensor,
    ref_weight_VH: torch.Tensor | None = None,
    *,
    bias_V: torch.Tensor | None = None,
    ref_bias_V: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    budget_bytes: int | None = None,
    engine: Engine | None = None,
) -> torch.Tensor:
    """`kl_R[r] = sum_v p_ref (log p_ref - log p)` in nats, the divergence KL(ref || policy) of TDPO (arXiv 2404.11999,
    eq. 12) at each row, with logits that are never all there: `p = softmax z`, `x = logit_scale (W h + bias)` and
    `z = softcap tanh(x / softcap) / temperature`, for the reference with its own hidden states and head. All tensors
    have one dtype (fp32, bf16, fp16 or fp64) and one device. Without `ref_weight_VH` the reference shares weight and
    bias of the policy. Tokens from `vocab_size` on are padding of the heads: they take no part and their gradient is
    zero. Differentiable (once) in `hidden_RH`, `weight_VH` and `bias_V`; the reference is a constant. Sharded weights
    (`DTensor`) are gathered, see `ttpa_kernels.sharded.whole`. Products accumulate in fp32 (fp64 for fp64 inputs) and
    so is the result, which is never negative, and 0 where policy and reference share hidden states and head; gradients
    have the dtype of the inputs. `budget_bytes` (None: 120 MiB on the CPU, 3 GiB on a GPU) bounds the memory beyond
    inputs, results and gradients, see `plan`. Raises ValueError or TypeError for shapes, dtypes, devices, values and
    budgets that do not fit. The gradient is `dkl/dz = p - p_ref`; derivation in `linear_kl/README.md`."""
    refuse_sharded(hidden_RH=hidden_RH, ref_hidden_RH=ref_hidden_RH)
    weight_VH, bias_V = whole(weight_VH, "weight_VH"), whole(bias_V, "bias_V")
    ref_weight_VH, ref_bias_V = whole(ref_weight_VH, "ref_weight_VH"), whole(ref_bias_V, "ref_bias_V")
    check_head(
        hidden_RH,
        weight_VH,
        bias_V=bias_V,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        vocab_size=vocab_size,
    )
    _check_reference(hidden_RH, weight_VH, ref_hidden_RH, ref_weight_VH, ref_bias_V)
    choose_kl_engine(hidden_RH.device, hidden_RH.dtype, engine)
    inputs = (hidden_RH, weight_VH, bias_V)
    needs = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs]
    return _forward(
        *(hidden_RH, weight_VH, ref_hidden_RH.detach()),
        None if ref_weight_VH is None else ref_weight_VH.detach(),
        bias_V,
        None if ref_bias_V is None else ref_bias_V.detach(),
        *(logit_scale, softcap, temperature, vocab_size or weight_VH.shape[0], budget_bytes, engine),
        needs,
    )[0]


def _check_reference(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    ref_hidden_RH: torch.Tensor,
    ref_weight_VH: torch.Tensor | None,
    ref_bias_V: torch.Tensor | None,
) -> None:
    """The reference has the shapes, the dtype and the device of the policy."""
    if ref_hidden_RH.shape != hidden_RH.shape:
        raise ValueError(
            f"ref_hidden_RH {tuple(ref_hidden_RH.shape)} must have the shape of hidden_RH {tuple(hidden_RH.shape)}: "
            "the same rows of the reference"
        )
    if ref_weight_VH is None and ref_bias_V is not None:
        raise ValueError(
            "ref_bias_V without ref_weight_VH: a reference that shares the head shares its bias; give "
            "ref_weight_VH=weight_VH for a bias of its own"
        )
    if ref_weight_VH is not None and ref_weight_VH.shape != weight_VH.shape:
        raise ValueError(
            f"ref_weight_VH {tuple(ref_weight_VH.shape)} must have the shape of weight_VH {tuple(weight_VH.shape)}"
        )
    if ref_bias_V is not None and ref_bias_V.shape != weight_VH.shape[:1]:
        raise ValueError(
            f"ref_bias_V {tuple(ref_bias_V.shape)} must have one entry for each of {len(weight_VH)} tokens"
        )
    tensors = {"ref_hidden_RH": ref_hidden_RH, "ref_weight_VH": ref_weight_VH, "ref_bias_V": ref_bias_V}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.dtype != hidden_RH.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and hidden_RH {hidden_RH.dtype}: give both the same")
    check_one_device(hidden_RH=hidden_RH, **given)


@torch.library.custom_op("ttpa_kernels::linear_kl", mutates_args=())
def _forward(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    ref_hidden_RH: torch.Tensor,
    ref_weight_VH: torch.Tensor | None,
    bias_V: torch.Tensor | None,
    ref_bias_V: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    vocab_size: int,
    budget_bytes: int | None,
    engine: str | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `passes.allocate` names."""
    problem = prepare(
        *(hidden_RH, weight_VH, ref_hidden_RH, ref_weight_VH, bias_V, ref_bias_V),
        logit_scale,
        softcap,
        temperature,
        vocab_size,
        budget_bytes,
        cast("Engine | None", engine),
        needs,
    )
    with torch.autocast(hidden_RH.device.type, enabled=False):
        return forward_pass(problem)


@_forward.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return allocate(prepare(*arguments))


@torch.library.custom_op("ttpa_kernels::linear_kl_head_gradients", mutates_args=())
def _head_gradients(
    grad_R: torch.Tensor,
    D_KV: torch.Tensor,
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    ref_hidden_RH: torch.Tensor,
    ref_weight_VH: torch.Tensor | None,
    bias_V: torch.Tensor | None,
    ref_bias_V: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    vocab_size: int,
    budget_bytes: int | None,
    engine: str | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight and bias; the one that is not needed has no rows."""
    problem = prepare(
        *(hidden_RH, weight_VH, ref_hidden_RH, ref_weight_VH, bias_V, ref_bias_V),
        logit_scale,
        softcap,
        temperature,
        vocab_size,
        budget_bytes,
        cast("Engine | None", engine),
        needs,
    )
    dweight_VH, dbias_V = _allocate_gradients(weight_VH, problem.needs)
    with torch.autocast(hidden_RH.device.type, enabled=False):
        head_gradients(problem, grad_R, D_KV, dweight_VH, dbias_V)
    return dweight_VH, dbias_V


@_head_gradients.register_fake
def _(
    grad_R: torch.Tensor, D_KV: torch.Tensor, hidden_RH: torch.Tensor, weight_VH: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _allocate_gradients(weight_VH, Needs(*rest[-1]))


def _allocate_gradients(weight_VH: torch.Tensor, needs: Needs) -> tuple[torch.Tensor, torch.Tensor]:
    V, H = weight_VH.shape
    return weight_VH.new_empty(V if needs.weight else 0, H), weight_VH.new_empty(V if needs.bias else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, gradient_RH, D_KV = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient_RH, D_KV, *inputs[:6])
    ctx.options = inputs[6:]


def _backward(ctx: Any, grad_R: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    gradient_RH, D_KV, *tensors = ctx.saved_tensors
    needs = Needs(*ctx.options[-1])
    dhidden_RH = dweight_VH = dbias_V = None
    if grad_R is not None:
        if needs.hidden:
            dhidden_RH = (gradient_RH * grad_R[:, None]).to(tensors[0].dtype)
        if needs.head:
            dweight_VH, dbias_V = _head_gradients(grad_R, D_KV, *tensors, *ctx.options)
    return (
        *(dhidden_RH, dweight_VH if needs.weight else None, None, None, dbias_V if needs.bias else None, None),
        *([None] * len(ctx.options)),
    )


_forward.register_autograd(_backward, setup_context=_setup_context)
