"""Other people's log-probabilities of given tokens, each called as its authors advise.

A peer is a function that prepares for a head and returns `logp(hidden_RH, weight_VH, target_R) -> logp_R`. Rows with
target IGNORED do not count; a peer that can leave them out does so in its own way, and gives them 0. All peers get the
same rows. A peer that cannot run here raises Absent.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F

from bench.inputs import Head
from bench.measure import Absent

IGNORED = -100
Logp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
TRL_CHUNK = 32768  # columns of a tile, as TRL's trainers pass it


def load(name: str) -> ModuleType:
    """A module of a peer; Absent where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken installation raises anything
        raise Absent(f"import {name}: {type(error).__name__}: {str(error)[:200]}") from error


def gpu_only(head: Head, what: str) -> None:
    if head.hidden_RH.device.type != "cuda":
        raise Absent(f"{what} runs on a GPU only")


def no_softcap(head: Head, what: str) -> None:
    if head.shape.softcap is not None:
        raise Absent(f"{what} has no softcap")


def eager(head: Head) -> Logp:
    """All logits in the dtype of the head, then a log-softmax in fp32. Rows that do not count are computed as well."""
    softcap = head.shape.softcap

    def logp(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
        logits_RV = (hidden_RH @ weight_VH.T).float()
        if softcap is not None:
            logits_RV = softcap * torch.tanh(logits_RV / softcap)
        logp_RV = F.log_softmax(logits_RV, dim=-1)
        counts_R = target_R != IGNORED
        return logp_RV.gather(1, target_R.clamp(min=0)[:, None])[:, 0] * counts_R

    return logp


def trl(head: Head) -> Logp:
    """TRL's function as `DPOTrainer` calls it: rows that do not count are taken out on a GPU and computed on a CPU."""
    function = load("trl.kernels").ChunkedLogProbFunction
    softcap = head.shape.softcap
    compact = head.hidden_RH.device.type == "cuda"

    def logp(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
        counts_R = target_R != IGNORED
        if not compact:
            logp_R = function.apply(
                hidden_RH, weight_VH, None, target_R.clamp(min=0), 1.0, TRL_CHUNK, softcap, 1.0, ()
            )[0]
            return logp_R.masked_fill(~counts_R, 0)
        logp_C = function.apply(
            hidden_RH[counts_R], weight_VH, None, target_R[counts_R], 1.0, TRL_CHUNK, softcap, 1.0, ()
        )[0]
        return logp_C.new_zeros(counts_R.shape).masked_scatter(counts_R, logp_C)

    return logp


def liger(head: Head) -> Logp:
    """Liger's log-probabilities per token: its CuTe kernel on Hopper, a PyTorch loop over 512 rows elsewhere.

    The check of the targets, which makes the host wait, is off.
    """
    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"
    function = load("liger_kernel.ops.fused_linear_scaled_cross_entropy").LigerFusedLinearScaledCrossEntropyFunction
    no_softcap(head, "Liger's kernel")
    if head.hidden_RH.is_cuda and torch.cuda.get_device_capability(head.hidden_RH.device) == (9, 0):
        if head.shape.dtype != torch.bfloat16:
            raise Absent("Liger's Hopper kernel takes bf16 only")
        load("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")

    def logp(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
        return -function.apply(hidden_RH, weight_VH, target_R)

    return logp


def cce(head: Head) -> Logp:
    """CCE with its defaults: gradients below a threshold are left out, rows that do not count are not computed."""
    function = _cce(head)
    softcap = head.shape.softcap

    def logp(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
        return -function(hidden_RH, weight_VH, target_R, softcap=softcap, reduction="none", impl="cce")

    return logp


def cce_exact(head: Head) -> Logp:
    """CCE without the threshold and with fp32 sums. The release on PyPI (25.1.1) has no such sums: its threshold is
    turned off and its gradients are summed in the dtype of the head."""
    function = _cce(head)
    softcap = head.shape.softcap
    sums = "accum_c_fp32" in inspect.signature(function).parameters
    exact: dict[str, str | None] = {"impl": "cce_exact"} if sums else {"impl": "cce", "filter_eps": None}

    def logp(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
        return -function(hidden_RH, weight_VH, target_R, softcap=softcap, reduction="none", **exact)

    return logp


def _cce(head: Head) -> Callable[..., torch.Tensor]:
    function = load("cut_cross_entropy").linear_cross_entropy
    gpu_only(head, "CCE")
    return function


def torch_chunked(head: Head) -> Logp:
    """`torch.nn.functional.linear_cross_entropy` (torch 2.13) in chunks, with the options that torch chooses itself."""
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy with chunks (2.13 has)")
    no_softcap(head, "linear_cross_entropy")

    def logp(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
        return -function(hidden_RH, weight_VH, target_R, reduction="none", options=options())

    return logp


# Products of `2 R V H` operations with both gradients, with that of the hidden states only, and without any.
PER_TOKEN: dict[str, tuple[Callable[[Head], Logp], tuple[float, float, float]]] = {
    "eager": (eager, (3, 2, 1)),
    "trl": (trl, (4, 3, 1)),
    "liger": (liger, (4, 4, 1)),
    "cce": (cce, (4, 3, 1)),
    "cce-exact": (cce_exact, (4, 3, 1)),
    "torch": (torch_chunked, (4, 3, 1)),
}


def quack(head: Head) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """QuACK's chunked cross-entropy, which gives one scalar: a coefficient for each row is beyond it."""
    function = load("quack.linear_cross_entropy").chunked_linear_cross_entropy
    gpu_only(head, "QuACK")
    no_softcap(head, "QuACK's chunked cross-entropy")
    if head.shape.R % 8 or head.shape.H % 8 or head.shape.V % 8:
        raise Absent("QuACK takes rows, hidden size and vocabulary in multiples of 8")

    def loss(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
        return function(hidden_RH, weight_VH, target_R, reduction="sum")

    return loss
