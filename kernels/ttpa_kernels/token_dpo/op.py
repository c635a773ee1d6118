"""The preference loss of pairs from log-probabilities of head rows.

P pairs, R head rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch

from ttpa_kernels.engine import Engine, choose_engine
from ttpa_kernels.numerics import wide
from ttpa_kernels.token_dpo.pairs import PairMatrix, Structure
from ttpa_kernels.token_dpo.segments import (
    LOSS_TYPES,
    Loss,
    LossType,
    PairValues,
    Part,
    pair_values_,
    row_gradients_,
    totals,
)


class Margins(NamedTuple):
    """Margins `m = C D` and rewards `beta m` of the pairs, the mean reward, and the share of pairs with a reward above
    0; fp64, on the device, without a gradient. Both means are 0 where there are no pairs."""

    margin_P: torch.Tensor
    reward_P: torch.Tensor
    mean_reward: torch.Tensor
    accuracy: torch.Tensor


def token_dpo(
    *,
    logp_R: torch.Tensor,
    ref_logp_R: torch.Tensor | None,
    pairs: PairMatrix,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    margin_P: torch.Tensor | None = None,
    pair_weight_P: torch.Tensor | None = None,
    denominator: float | None = None,
    engine: Engine | None = None,
) -> tuple[torch.Tensor, Margins]:
    """Preference loss `sum_p u_p f(beta m_p + gamma_p) / denominator` with margins `m = C (logp - ref_logp)`.

    `logp_R` and `ref_logp_R` (None: 0, as in SimPO) are in nats, `pairs` is C; `margin_P` is gamma (None: 0) and
    `pair_weight_P` is u (None: 1), `denominator` is P where it is None. f is `-log sigmoid(x)` for sigmoid (DPO, arXiv
    2305.18290 eq. 7), with label smoothing e `-(1 - e) log sigmoid(x) - e log sigmoid(-x)`; `(-(1 - e) log sigmoid(x) +
    e log sigmoid(-x)) / (1 - 2e)` for robust (arXiv 2403.00409); `max(0, 1 - x)` for hinge (SLiC, arXiv 2305.10425);
    `((x - 1/2) / beta)^2` for ipo (arXiv 2310.12036 eq. 17); and `-x` for linear (with beta 1: weighted likelihood).
    Everything is summed in fp64, so that equal models give ln 2 to the last bit. The loss is fp32 (fp64 for fp64
    log-probabilities) and differentiable in `logp_R`, `dlogp = C^T (u f' beta) / denominator`, to the bit the same in
    every run; the reference, C, gamma and u are constants. Nothing waits for the device. Raises TypeError and
    ValueError for an unknown loss, label smoothing outside [0, 0.5) or with a loss that has none, a denominator of 0,
    and shapes, dtypes and devices that do not fit.
    """
    check_loss(loss_type, beta, label_smoothing, denominator)
    P, R, device = pairs.num_pairs, pairs.num_rows, logp_R.device
    check_vectors(device, R, "head rows", logp_R=logp_R, ref_logp_R=ref_logp_R)
    check_vectors(device, P, "pairs", margin_P=margin_P, pair_weight_P=pair_weight_P)
    check_pairs(pairs, device)
    loss, m_P, reward_P, means_2, _ = _token_dpo(
        logp_R,
        None if ref_logp_R is None else ref_logp_R.detach(),
        list(pairs.structure),
        None if margin_P is None else margin_P.detach(),
        None if pair_weight_P is None else pair_weight_P.detach(),
        beta,
        loss_type,
        label_smoothing,
        float(max(P, 1) if denominator is None else denominator),
        choose_engine(device, engine),
    )
    return loss, Margins(m_P, reward_P, means_2[0], means_2[1])


def check_loss(loss_type: str, beta: float, label_smoothing: float, denominator: float | None) -> None:
    """Raise ValueError for options of the loss that have no meaning."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}, not one of {', '.join(LOSS_TYPES)}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type not in ("sigmoid", "robust")):
        raise ValueError(
            f"label_smoothing is {label_smoothing} with loss_type={loss_type!r}: it lies in [0, 0.5) and goes with "
            "sigmoid and robust"
        )
    if not beta > 0:
        raise ValueError(f"beta is {beta}: give a number above 0")
    if denominator is not None and not denominator > 0:
        raise ValueError(f"denominator is {denominator}: give a number above 0")


def check_vectors(device: torch.device, size: int, of: str, **vectors: torch.Tensor | None) -> None:
    """Raise ValueError or TypeError for vectors that are not floating-point numbers, one for each row or pair."""
    for name, x in vectors.items():
        if x is None:
            continue
        if x.shape != (size,):
            raise ValueError(f"{name} is {tuple(x.shape)}, C has {size} {of}: give one number for each")
        if not x.is_floating_point():
            raise TypeError(f"{name} is {x.dtype}: convert it to torch.float32")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, the others are on {device}: move them to one device")


def check_pairs(pairs: PairMatrix, device: torch.device) -> None:
    if pairs.structure.row_E.device != device:
        raise ValueError(f"pairs is on {pairs.structure.row_E.device}: give pairs.to({str(device)!r})")


@torch.library.custom_op("ttpa_kernels::token_dpo", mutates_args=())
def _token_dpo(
    logp_R: torch.Tensor,
    ref_logp_R: torch.Tensor | None,
    structure: list[torch.Tensor],
    margin_P: torch.Tensor | None,
    pair_weight_P: torch.Tensor | None,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    denominator: float,
    engine: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, margins and rewards of pairs, the two means, and the slopes that the gradient needs."""
    C, chosen = Structure(*structure), cast(Engine, engine)
    loss = Loss(beta, loss_type, label_smoothing, denominator, _dense(margin_P), _dense(pair_weight_P))
    values = PairValues.empty(len(C.order_P), logp_R.device)
    pair_values_(values, C, _whole(C), logp_R.contiguous(), _dense(ref_logp_R), loss, engine=chosen)
    return *totals_of(values, wide(logp_R.dtype), engine=chosen), values.slope_P


def totals_of(
    values: PairValues, dtype: torch.dtype, *, engine: Engine
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, the margins, the rewards and the two means."""
    loss, means_2 = totals(values, dtype, engine=engine)
    return loss, values.margin_P, values.reward_P, means_2


@_token_dpo.register_fake
def _(
    logp_R: torch.Tensor, ref_logp_R: torch.Tensor | None, structure: list[torch.Tensor], *options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def fp64(*shape: Any) -> torch.Tensor:
        return logp_R.new_empty(shape, dtype=torch.float64)

    P = len(structure[0])
    return logp_R.new_empty((), dtype=wide(logp_R.dtype)), fp64(P), fp64(P), fp64(2), fp64(P)


@torch.library.custom_op("ttpa_kernels::token_dpo_backward", mutates_args=())
def _token_dpo_backward(
    upstream: torch.Tensor, slope_P: torch.Tensor, structure: list[torch.Tensor], dtype: torch.dtype, engine: str
) -> torch.Tensor:
    C = Structure(*structure)
    dlogp_R = torch.empty(len(C.order_R), dtype=dtype, device=slope_P.device)
    row_gradients_(dlogp_R, C, _whole(C), slope_P, upstream=upstream, engine=cast(Engine, engine))
    return dlogp_R


@_token_dpo_backward.register_fake
def _(
    upstream: torch.Tensor, slope_P: torch.Tensor, structure: list[torch.Tensor], dtype: torch.dtype, engine: str
) -> torch.Tensor:
    return slope_P.new_empty(len(structure[4]), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(output[4], *inputs[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype, ctx.engine = inputs[0].dtype, inputs[9]


def _backward(ctx: Any, upstream: torch.Tensor, *unused: Any) -> tuple[Any, ...]:
    slope_P, *structure = ctx.saved_tensors
    dlogp_R = _token_dpo_backward(upstream, slope_P, structure, ctx.dtype, ctx.engine)
    return (dlogp_R, None, [None] * len(structure), *[None] * 7)


_token_dpo.register_autograd(_backward, setup_context=_save)


def _whole(C: Structure) -> Part:
    return Part(slice(0, len(C.order_P)), slice(0, len(C.order_R)), slice(0, len(C.row_E)))


def _dense(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()
