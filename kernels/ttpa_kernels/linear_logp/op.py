"""Log-probabilities of given tokens straight from hidden states and the head, without a matrix of logits.

R head rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_BYTES = 64 << 20  # logits that exist at one time
DTYPES = (torch.float32, torch.bfloat16, torch.float64)  # float16 cannot hold the sums that are kept
KEEP_BYTES = 256 << 20  # exponentials kept for the backward pass; beyond this they are computed again


def linear_logp(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
    """`logp_R[r] = z_r[target_r] - log sum_v exp(z_r[v])` in nats, with logits `z_r = W h_r` that are never all there.

    `hidden_RH` and `weight_VH` share a dtype (fp32, bf16 or fp64) and a device, `target_R` is int64 in [0, V).
    Differentiable in the first two. Products accumulate in fp32 (fp64 for fp64 inputs), and so are the results;
    gradients have the dtype of the inputs. Memory beyond the inputs is bounded: one chunk of logits, and a budget of
    kept exponentials. Raises ValueError or TypeError for shapes, dtypes, devices and (on CPU) targets that do not fit.
    """
    _check(hidden_RH, weight_VH, target_R)
    return _LinearLogp.apply(hidden_RH, weight_VH, target_R)


class _LinearLogp(torch.autograd.Function):
    """With `E = exp(z - max z)` and `s = sum E`, the gradient of logp in z is `-(E - s onehot) / s`.

    So E, with s subtracted at the target, is all that the backward pass needs, and the factor `-g / s` of a row goes
    to the narrow side of each product: `dH = (-g / s) (E W)` and `dW = E^T ((-g / s) H)`.
    """

    @staticmethod
    def forward(ctx: Any, hidden_RH: torch.Tensor, weight_VH: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
        (R, V), wide = (len(hidden_RH), len(weight_VH)), _wide(hidden_RH.dtype)
        logp_R = torch.empty(R, dtype=wide, device=hidden_RH.device)
        total_R = torch.empty_like(logp_R)
        backward = any(ctx.needs_input_grad)
        keep = backward and R * V * wide.itemsize <= KEEP_BYTES
        operand_VH = _operand(weight_VH)
        kept = []
        for rows in _chunks(R, V * wide.itemsize):
            E_CV, logp_R[rows], total_R[rows] = _exponentials(_operand(hidden_RH[rows]), operand_VH, target_R[rows])
            if keep:
                kept.append(E_CV.to(operand_VH.dtype))
        if backward:
            ctx.save_for_backward(hidden_RH, weight_VH, target_R, total_R, *kept)
        return logp_R

    @staticmethod
    def backward(ctx: Any, grad_R: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden_RH, weight_VH, target_R, total_R, *kept = ctx.saved_tensors
        wide = _wide(hidden_RH.dtype)
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        factor_R = -grad_R / total_R
        operand_VH = _operand(weight_VH)
        dhidden_RH = torch.empty_like(hidden_RH) if needs_hidden else None
        dweight_VH: torch.Tensor | None = None
        for i, rows in enumerate(_chunks(len(hidden_RH), len(weight_VH) * wide.itemsize)):
            hidden_CH, factor_C1 = _operand(hidden_RH[rows]), factor_R[rows, None]
            if kept:
                E_CV = kept[i]
            else:
                E_CV = _exponentials(hidden_CH, operand_VH, target_R[rows])[0].to(operand_VH.dtype)
            if dhidden_RH is not None:
                dhidden_RH[rows] = _product(E_CV, operand_VH).mul_(factor_C1)
            if needs_weight:
                part_VH = _product(E_CV.T, (hidden_CH * factor_C1).to(E_CV.dtype))
                dweight_VH = part_VH if dweight_VH is None else dweight_VH.add_(part_VH)
        if needs_weight:
            dweight_VH = torch.zeros_like(weight_VH) if dweight_VH is None else dweight_VH.to(weight_VH.dtype)
        return dhidden_RH, dweight_VH, None


def _exponentials(
    hidden_CH: torch.Tensor, weight_VH: torch.Tensor, target_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`exp(z - max z)` with its sum subtracted at the target, the log-probability, and the sum."""
    z_CV = _product(hidden_CH, weight_VH.T)
    z_CV -= z_CV.amax(dim=1, keepdim=True)
    target_C1 = target_C[:, None]
    at_target_C = z_CV.gather(1, target_C1)[:, 0]
    E_CV = z_CV.exp_()
    total_C = E_CV.sum(dim=1)
    E_CV.scatter_add_(1, target_C1, -total_C[:, None])
    return E_CV, at_target_C - total_C.log(), total_C


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _operand(x: torch.Tensor) -> torch.Tensor:
    """A factor as `_product` takes it: GPUs multiply half precision into fp32 accumulators, CPUs need fp32 factors."""
    return x if x.is_cuda else x.to(_wide(x.dtype))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` in the wide dtype, also where autocast would round it."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b if a.dtype == _wide(a.dtype) else torch.mm(a, b, out_dtype=torch.float32)


def _chunks(num_rows: int, row_bytes: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // row_bytes)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _check(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, target_R: torch.Tensor) -> None:
    if hidden_RH.ndim != 2 or weight_VH.ndim != 2 or hidden_RH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden_RH {tuple(hidden_RH.shape)} and weight_VH {tuple(weight_VH.shape)} must be matrices of the same "
            "width H"
        )
    if target_R.shape != hidden_RH.shape[:1]:
        raise ValueError(f"target_R {tuple(target_R.shape)} must have one entry for each of {len(hidden_RH)} rows")
    if target_R.dtype != torch.int64:
        raise TypeError(f"target_R is {target_R.dtype}: convert it to torch.int64")
    if hidden_RH.dtype != weight_VH.dtype or hidden_RH.dtype not in DTYPES:
        raise TypeError(
            f"hidden_RH is {hidden_RH.dtype} and weight_VH {weight_VH.dtype}: give both the same one of "
            + ", ".join(map(str, DTYPES))
        )
    if not hidden_RH.device == weight_VH.device == target_R.device:
        raise ValueError(
            f"hidden_RH is on {hidden_RH.device}, weight_VH on {weight_VH.device}, target_R on {target_R.device}: "
            "move them to one device"
        )
    # On a GPU this check would make the host wait for the device; an index out of range stops the kernel there.
    if target_R.device.type == "cpu" and len(target_R):
        low, high = int(target_R.min()), int(target_R.max())
        if low < 0 or high >= len(weight_VH):
            raise ValueError(f"target_R lies in [{low}, {high}], the vocabulary is [0, {len(weight_VH)})")
