"""Inputs that look like those of a trained model, at any size and without one.

R head rows, H hidden size, V vocabulary, P pairs, T packed tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

SPREAD = 1.75  # standard deviation of the logits around the log-frequency of their token


@dataclass(frozen=True)
class HeadShape:
    """Rows, hidden size, vocabulary and dtype of a head; `softcap` as in Gemma."""

    R: int
    H: int
    V: int
    dtype: torch.dtype
    softcap: float | None = None

    @property
    def unit(self) -> float:
        """Floating-point operations of one product: `2 R V H`."""
        return 2.0 * self.R * self.V * self.H

    def __str__(self) -> str:
        name = f"R{self.R}-H{self.H}-V{self.V}-{str(self.dtype).removeprefix('torch.')}"
        return f"{name}-softcap{self.softcap:g}" if self.softcap else name


@dataclass(frozen=True)
class Head:
    """Hidden states, head, targets, and the gradient that reaches each log-probability."""

    shape: HeadShape
    hidden_RH: torch.Tensor
    weight_VH: torch.Tensor
    target_R: torch.Tensor
    grad_R: torch.Tensor


def peaked_head(shape: HeadShape, device: torch.device, *, seed: int = 0) -> Head:
    """A head whose predictions are as peaked as those of a trained model.

    The logit of a token is the logarithm of its frequency (Zipf: 1 / rank), noise of standard deviation SPREAD, and
    for the target as much as its probability asks for; that is spread evenly over 0.05 to 0.99. Targets follow the
    frequencies. Random weights alone would give every token a probability near 1 / V: kernels that skip small
    gradients would then have nothing to compute. Here about half of the 128 x 128 tiles hold a gradient above
    CCE's threshold, 2^-12 (`tests/test_bench_inputs.py` checks it), as on trained models.
    """
    R, H, V = shape.R, shape.H, shape.V
    generator = torch.Generator(device).manual_seed(seed)
    log_frequency_V = -torch.log(torch.arange(1, V + 1, device=device, dtype=torch.float32))
    log_frequency_V -= log_frequency_V.logsumexp(0)
    center = log_frequency_V.mean()
    # The last column carries the frequencies, the others the noise and the direction of each token.
    weight_VH = torch.randn(V, H, device=device, generator=generator) / math.sqrt(H)
    weight_VH[:, -1] = (log_frequency_V - center) / 4
    target_R = torch.multinomial(log_frequency_V.exp(), R, replacement=True, generator=generator)
    direction_RH = weight_VH[target_R]
    direction_RH[:, -1] = 0
    length_R = direction_RH.square().sum(dim=1)
    probability_R = 0.05 + 0.94 * torch.rand(R, device=device, generator=generator)
    wanted_R = torch.logit(probability_R) + SPREAD**2 / 2 - log_frequency_V[target_R]
    # The target's direction is noise to all other tokens, of variance wanted^2 / H.
    noise_R = (SPREAD**2 - wanted_R.square() / H).clamp(min=0).sqrt()
    hidden_RH = noise_R[:, None] * torch.randn(R, H, device=device, generator=generator)
    hidden_RH[:, -1] = 4
    along_R = (hidden_RH * direction_RH).sum(dim=1)
    hidden_RH += ((wanted_R - along_R) / length_R)[:, None] * direction_RH
    # As the coefficients of a preference loss: both signs, many sizes.
    grad_R = torch.randn(R, device=device, generator=generator) / R
    return Head(shape, hidden_RH.to(shape.dtype), weight_VH.to(shape.dtype), target_R, grad_R)


@dataclass(frozen=True)
class Pairs:
    """Coefficients of P pairs over the rows of a head, one pair after the other, each side `R / 2P` rows long.

    The rows of the chosen side of a pair come first, with coefficient 1, then those of the rejected side, with -1; rows
    that are not in `counts_R` have the coefficient 0.
    """

    num_pairs: int
    counts_R: torch.Tensor
    pair_R: torch.Tensor = field(init=False)
    sign_R: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        R = len(self.counts_R)
        row_R = torch.arange(R, device=self.counts_R.device)
        side_R = row_R // (R // (2 * self.num_pairs))
        object.__setattr__(self, "pair_R", side_R // 2)
        object.__setattr__(self, "sign_R", (1.0 - 2.0 * (side_R % 2)) * self.counts_R)

    def matrix(self) -> torch.Tensor:
        """The coefficients as a sparse matrix `[P, R]`."""
        row_E = self.counts_R.nonzero()[:, 0]
        indices = torch.stack([self.pair_R[row_E], row_E])
        size = (self.num_pairs, len(self.counts_R))
        return torch.sparse_coo_tensor(indices, self.sign_R[row_E], size, check_invariants=True).coalesce()


def make_pairs(R: int, num_pairs: int, *, share: float, device: torch.device, seed: int = 1) -> Pairs:
    """Pairs over R rows, of which only `share` have a coefficient, in runs as where completions differ."""
    generator = torch.Generator(device).manual_seed(seed)
    length = R // (2 * num_pairs)
    assert length * 2 * num_pairs == R, "the sides of all pairs have one length"
    run = max(1, round(share * length))
    start_S = torch.randint(0, length - run + 1, (2 * num_pairs, 1), device=device, generator=generator)
    place_SL = torch.arange(length, device=device)[None]
    counts_R = ((place_SL >= start_S) & (place_SL < start_S + run)).flatten()
    return Pairs(num_pairs, counts_R)


def tree_ends(trees: int, prompt: int, branches: int, completion: int) -> list[int]:
    """`end_T` of packed trees: a prompt and `branches` completions that share nothing but it."""
    ends: list[int] = []
    for _ in range(trees):
        start = len(ends)
        ends += [start + prompt + branches * completion] * prompt
        for b in range(branches):
            ends += [start + prompt + (b + 1) * completion] * completion
    return ends
