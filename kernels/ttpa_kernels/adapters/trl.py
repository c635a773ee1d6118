"""TRL's fused head, computed by `linear_logp`:

    import ttpa_kernels.adapters.trl
    ttpa_kernels.adapters.trl.install()

From there on the trainers of TRL 1.16 that score tokens with a fused head (DPO, KTO, GRPO, RLOO, SFT) use it.
"""

from __future__ import annotations

from typing import Any

import torch

from ttpa_kernels.linear_logp.op import linear_logp, linear_logp_stats

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class ChunkedLogProbFunction:
    """In place of `trl.kernels.ChunkedLogProbFunction`: the same `apply`, the same five results."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Log-probabilities `[N]` in nats of `targets [N]` under `softmax(z)`, from `hidden [N, H]`, `weight [V, H]`
        and `bias [V]`, and of `outputs` the entropy, `log sum p^2`, the mean logit and whether the target is the most
        likely token (None where not asked for); fp32. Products run in the dtype of `hidden`, under autocast on a GPU
        in autocast's. `chunk_size` has no meaning here: `linear_logp` plans its own. The head of a model under
        DeepSpeed ZeRO-3, which is there only while TRL gathers it, is left to TRL's own function. Raises what
        `linear_logp` raises. `z = softcap tanh(logit_scale (W h + bias) / softcap) / temperature`."""
        if hasattr(weight, "ds_id"):
            from trl.kernels.chunked_logprob import ChunkedLogProbFunction as original

            return original.apply(
                *(hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            )
        dtype = _compute_dtype(hidden, weight)
        options: dict[str, Any] = {
            "bias_V": None if bias is None else bias.to(dtype),
            "logit_scale": float(logit_scale),
            "softcap": final_logit_softcapping,
            "temperature": float(temperature),
        }
        if not set(outputs) & set(OPTIONAL_OUTPUTS):
            return linear_logp(hidden.to(dtype), weight.to(dtype), targets, **options), None, None, None, None
        logp_R, stats = linear_logp_stats(hidden.to(dtype), weight.to(dtype), targets, **options)
        entropy_R, log_sum_sq_probs_R, mean_logit_R, is_top1_R = (
            value if name in outputs else None for name, value in zip(OPTIONAL_OUTPUTS, stats[1:], strict=True)
        )
        return logp_R, entropy_R, log_sum_sq_probs_R, mean_logit_R, is_top1_R


def _compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Autocast is for speed: on the CPU, where products are fp32 in any case, nothing is rounded."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return hidden.dtype
    return torch.promote_types(hidden.dtype, weight.dtype) if kind == "cpu" else torch.get_autocast_dtype(kind)


def install() -> None:
    """Let TRL's trainers use `linear_logp`; raises RuntimeError for a version of TRL without the place for it."""
    _replace(ChunkedLogProbFunction)


def uninstall() -> None:
    """Undo `install`."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction as original

    _replace(original)


def _replace(function: type) -> None:
    import trl
    import trl.kernels
    import trl.trainer.utils

    places = ((trl.kernels, "ChunkedLogProbFunction"), (trl.trainer.utils, "_ChunkedLogProbFunction"))
    for module, name in places:
        if not hasattr(module, name):
            raise RuntimeError(f"TRL {trl.__version__} has no {module.__name__}.{name}: install trl==1.16")
    for module, name in places:
        setattr(module, name, function)
