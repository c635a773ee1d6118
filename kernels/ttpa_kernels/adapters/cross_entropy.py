"""Cross entropy of a linear head, with the signature of `torch.nn.functional.linear_cross_entropy`."""

from __future__ import annotations

from typing import Literal

import torch

from ttpa_kernels.engine import Engine
from ttpa_kernels.linear_logp.op import linear_logp


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    budget_bytes: int | None = None,
    engine: Engine | None = None,
) -> torch.Tensor:
    """`F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)` in nats without the logits: `input`
    is `[N, H]` or `[H]`, `linear_weight [V, H]`, `linear_bias [V]`, all of one dtype, `target` int64 `[N]` or `[]`,
    `weight [V]` an optional factor of each class. Unlike torch's, the result is fp32 (fp64 for fp64 inputs), also with
    reduction 'none'. Rows whose target is `ignore_index` (None: -100) have no loss and no gradient and never reach the
    head; to count them, a GPU is waited for once. `loss_n = -weight[y_n] log p_n(y_n)`; 'mean' divides their sum by
    that of the factors. `budget_bytes` and `engine` are those of `linear_logp`, and so are the errors; ValueError also
    for label smoothing and heads of more dimensions, which are not supported, and TypeError for class probabilities
    as targets."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: give 'none', 'mean' or 'sum'")
    if label_smoothing:
        raise ValueError(
            f"label_smoothing is {label_smoothing}: only 0 is supported, use torch.nn.functional.linear_cross_entropy"
        )
    if target.is_floating_point():
        raise TypeError(f"target is {target.dtype}: class probabilities are not supported, give int64 class indices")
    if linear_weight.ndim != 2 or input.ndim not in (1, 2) or target.shape != input.shape[:-1]:
        raise ValueError(
            f"input {tuple(input.shape)}, linear_weight {tuple(linear_weight.shape)} and target {tuple(target.shape)} "
            "must be [N, H], [V, H] and [N], or [H], [V, H] and []"
        )
    if weight is not None and weight.shape != linear_weight.shape[:1]:
        raise ValueError(f"weight {tuple(weight.shape)} must have one entry for each of {len(linear_weight)} classes")
    target_N = target.reshape(-1)
    counted_N = target_N != (-100 if ignore_index is None else ignore_index)
    target_R = target_N[counted_N]
    hidden_RH = input.reshape(-1, input.shape[-1])[counted_N]
    loss_R = -linear_logp(
        hidden_RH, linear_weight, target_R, bias_V=linear_bias, budget_bytes=budget_bytes, engine=engine
    )
    factor_R = torch.ones_like(loss_R) if weight is None else weight.to(loss_R.dtype)[target_R]
    loss_R = loss_R * factor_R
    if reduction == "none":
        return loss_R.new_zeros(len(target_N)).masked_scatter(counted_N, loss_R).reshape(target.shape)
    return loss_R.sum() / factor_R.sum() if reduction == "mean" else loss_R.sum()
