"""The engine 'torch': one chunk of the vocabulary after the other, each folded into running results.

B decode rows, H hidden size, V vocabulary, C columns of a chunk, G groups of a chunk, K kept tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from ttpa_kernels.linear_logp.chunks import VANISHED, Head
from ttpa_kernels.next_token.noise import gumbel
from ttpa_kernels.numerics import operand, product

if TYPE_CHECKING:
    from ttpa_kernels.next_token.op import Results

CHUNK = 16384  # columns
GROUP = 64  # columns whose maximum is found before the most likely tokens are
LOWEST = -1e30  # a maximum of -inf would make its differences NaN


class Moments(NamedTuple):
    """Of logits z under weights `e^(z - peak)`: the weights' sum, the mean of `z - peak`, and the sum of the weighted
    squares of what z differs from the mean."""

    peak_B: torch.Tensor
    total_B: torch.Tensor
    mean_B: torch.Tensor
    spread_B: torch.Tensor


def next_token(head: Head, hidden_BH: torch.Tensor, *, num_top: int, key_B: torch.Tensor | None) -> Results:
    """The fields of `NextToken`; draws are empty without keys."""
    B, V = len(hidden_BH), len(head.weight_VH)
    hidden_BH = operand(hidden_BH)
    zero_B = hidden_BH.new_zeros(B)
    moments = Moments(zero_B + LOWEST, zero_B, zero_B, zero_B)
    top_logit_BK, top_id_BK = hidden_BH.new_empty(B, 0), torch.empty(B, 0, dtype=torch.int64, device=hidden_BH.device)
    best_B, draw_B, draw_logit_B = zero_B - torch.inf, torch.zeros_like(zero_B, dtype=torch.int64), zero_B - torch.inf
    for start in range(0, V, CHUNK):
        stop = min(start + CHUNK, V)
        z_BC = _logits(head, hidden_BH, start, stop)
        if key_B is not None:
            noisy_B, at_B = (z_BC + gumbel(key_B, start, stop)).max(dim=1)
            better_B = ~(noisy_B <= best_B)
            best_B = torch.where(better_B, noisy_B, best_B)
            draw_B = torch.where(better_B, start + at_B, draw_B)
            draw_logit_B = torch.where(better_B, z_BC.gather(1, at_B[:, None])[:, 0], draw_logit_B)
        z_BC = pad(z_BC, (0, (start - stop) % GROUP), value=-torch.inf)
        peak_BG = z_BC.unflatten(1, (-1, GROUP)).amax(dim=2)
        if num_top:
            logit_BK, id_BK = _top(z_BC, peak_BG, num_top)
            both, ids = torch.cat([top_logit_BK, logit_BK], dim=1), torch.cat([top_id_BK, start + id_BK], dim=1)
            top_logit_BK, order = (x[:, :num_top] for x in both.sort(dim=1, descending=True, stable=True))
            top_id_BK = ids.gather(1, order)
        moments = _joined(moments, _moments_(z_BC, peak_BG.amax(dim=1)))
    lse_B = moments.peak_B + moments.total_B.log()
    entropy_B = moments.total_B.log() - moments.mean_B
    varentropy_B = moments.spread_B / moments.total_B
    draw_logp_B = (draw_logit_B - lse_B).clamp_(max=0.0)
    if key_B is None:
        draw_B, draw_logp_B = draw_B.new_empty(0), draw_logp_B.new_empty(0)
    return lse_B, entropy_B, varentropy_B, top_logit_BK.contiguous(), top_id_BK, draw_B, draw_logp_B


def _logits(head: Head, hidden_BH: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    z_BC = product(hidden_BH, operand(head.weight_VH[start:stop]).T)
    if head.bias_V is not None:
        z_BC += head.bias_V[start:stop]
    if head.softcap is None:
        return z_BC.mul_(head.logit_scale).div_(head.temperature)
    z_BC.mul_(head.logit_scale / head.softcap).tanh_()
    return z_BC.mul_(head.softcap / head.temperature)


def _top(z_BC: torch.Tensor, peak_BG: torch.Tensor, num_top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely tokens of a chunk. They lie in the groups with the largest maxima: every group before theirs
    holds a token that comes before them. Stable sorts keep the lower id first where logits are equal."""
    group_BK = peak_BG.sort(dim=1, descending=True, stable=True).indices[:, :num_top].sort(dim=1).values
    column_G = torch.arange(GROUP, device=z_BC.device)
    id_BN = (group_BK[:, :, None] * GROUP + column_G).flatten(1)
    logit_BN, order_BN = z_BC.gather(1, id_BN).sort(dim=1, descending=True, stable=True)
    return logit_BN[:, :num_top], id_BN.gather(1, order_BN[:, :num_top])


def _moments_(z_BC: torch.Tensor, peak_B: torch.Tensor) -> Moments:
    """Of the logits of a chunk, which are overwritten."""
    peak_B = peak_B.clamp(min=LOWEST)
    d_BC = z_BC.sub_(peak_B[:, None]).clamp_(min=VANISHED)
    e_BC = d_BC.exp()
    total_B = e_BC.sum(dim=1)
    mean_B = (e_BC * d_BC).sum(dim=1) / _positive(total_B)
    spread_B = d_BC.sub_(mean_B[:, None]).square_().mul_(e_BC).sum(dim=1)
    return Moments(peak_B, total_B, mean_B, spread_B)


def _joined(a: Moments, b: Moments) -> Moments:
    """Of two parts together (Chan, Golub, LeVeque 1979): every term is positive, so nothing cancels."""
    peak_B = torch.maximum(a.peak_B, b.peak_B)
    shift_a_B, shift_b_B = (a.peak_B - peak_B).clamp(min=VANISHED), (b.peak_B - peak_B).clamp(min=VANISHED)
    factor_a_B, factor_b_B = shift_a_B.exp(), shift_b_B.exp()
    total_a_B, total_b_B = a.total_B * factor_a_B, b.total_B * factor_b_B
    mean_a_B, mean_b_B = a.mean_B + shift_a_B, b.mean_B + shift_b_B
    total_B = total_a_B + total_b_B
    share_a_B, share_b_B = total_a_B / _positive(total_B), total_b_B / _positive(total_B)
    between_B = total_a_B * share_b_B * (mean_a_B - mean_b_B).square()
    spread_B = a.spread_B * factor_a_B + b.spread_B * factor_b_B + between_B
    return Moments(peak_B, total_B, share_a_B * mean_a_B + share_b_B * mean_b_B, spread_B)


def _positive(total_B: torch.Tensor) -> torch.Tensor:
    """1 instead of a sum of 0, which is that of logits of -inf alone."""
    return torch.where(total_B == 0, 1.0, total_B)
