"""Checks of arguments that several operations share; each error says what to change."""

from __future__ import annotations

import math

import torch

HEAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_head(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    adapter_RA: torch.Tensor | None = None,
    adapter_VA: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> None:
    """Hidden states, head and its options fit together: ValueError for shapes, devices and values, else TypeError."""
    if hidden_RH.ndim != 2 or weight_VH.ndim != 2 or hidden_RH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden_RH {tuple(hidden_RH.shape)} and weight_VH {tuple(weight_VH.shape)} must be matrices of the same "
            "width H"
        )
    if weight_VH.shape[0] == 0:
        raise ValueError("weight_VH has no rows: a head needs a vocabulary of at least one token")
    if bias_V is not None and bias_V.shape != weight_VH.shape[:1]:
        raise ValueError(f"bias_V {tuple(bias_V.shape)} must have one entry for each of {len(weight_VH)} tokens")
    if (adapter_RA is None) != (adapter_VA is None):
        raise ValueError("an adapter has two halves: give both adapter_RA (u = s A h) and adapter_VA (B), or neither")
    if adapter_RA is not None and adapter_VA is not None:
        R, V = hidden_RH.shape[0], weight_VH.shape[0]
        if adapter_RA.ndim != 2 or adapter_VA.ndim != 2 or adapter_RA.shape[1] != adapter_VA.shape[1]:
            raise ValueError(
                f"adapter_RA {tuple(adapter_RA.shape)} and adapter_VA {tuple(adapter_VA.shape)} must be matrices of "
                "the same rank A"
            )
        if adapter_RA.shape[0] != R or adapter_VA.shape[0] != V:
            raise ValueError(
                f"adapter_RA {tuple(adapter_RA.shape)} and adapter_VA {tuple(adapter_VA.shape)} must have {R} rows "
                f"(as hidden_RH) and {V} rows (as weight_VH)"
            )
    tensors = {"hidden_RH": hidden_RH, "weight_VH": weight_VH, "bias_V": bias_V}
    tensors |= {"adapter_RA": adapter_RA, "adapter_VA": adapter_VA}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if hidden_RH.dtype not in HEAD_DTYPES or any(tensor.dtype != hidden_RH.dtype for tensor in given.values()):
        raise TypeError(
            ", ".join(f"{name} is {tensor.dtype}" for name, tensor in given.items())
            + ": give all the same one of "
            + ", ".join(map(str, HEAD_DTYPES))
        )
    check_one_device(**given)
    if vocab_size is not None and not 1 <= vocab_size <= len(weight_VH):
        raise ValueError(f"vocab_size is {vocab_size}: it lies in [1, {len(weight_VH)}], the rows of weight_VH")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale is {logit_scale}: give a finite number")
    if softcap is not None and not (0 < softcap < math.inf):
        raise ValueError(f"softcap is {softcap}: give a positive number, or None for none")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: give a positive number")


def check_targets(target_R: torch.Tensor, hidden_RH: torch.Tensor) -> None:
    """One int64 target for each row, on the same device: ValueError or TypeError."""
    if target_R.shape != hidden_RH.shape[:1]:
        raise ValueError(f"target_R {tuple(target_R.shape)} must have one entry for each of {len(hidden_RH)} rows")
    if target_R.dtype != torch.int64:
        raise TypeError(f"target_R is {target_R.dtype}: convert it to torch.int64")
    check_one_device(hidden_RH=hidden_RH, target_R=target_R)


def check_target_range(target_R: torch.Tensor, vocab_size: int) -> None:
    """Targets lie in the vocabulary, else ValueError; checked on the CPU only, a GPU would have to be waited for."""
    if target_R.device.type == "cpu" and len(target_R):
        low, high = int(target_R.min()), int(target_R.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"target_R lies in [{low}, {high}], the vocabulary is [0, {vocab_size})")


def check_one_device(**tensors: torch.Tensor) -> None:
    """All tensors are on one device, else ValueError."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} is on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"{places}: move them to one device")
