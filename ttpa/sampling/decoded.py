"""What is known of one answer that a model wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass
class Decoded:
    """One answer, its end-of-turn token included.

    `finish` is stop or length. `logps`, `entropy` (nats) and `varentropy` (nats squared) are those of each token in the
    full distribution at temperature 1; `top_ids` and `top_probabilities` `[n, K]` are the likeliest tokens at each
    position, in order. `complete` is False where a draw was filtered and the filter would have kept more tokens than
    the K known ones.
    """

    ids: list[int]
    finish: str
    logps: list[float]
    entropy: list[float]
    varentropy: list[float]
    top_ids: np.ndarray
    top_probabilities: np.ndarray
    complete: bool = True


class Written(NamedTuple):
    """Tokens that one pass predicted, of which the first may be taken; `complete[i]` is that of token i alone."""

    decoded: Decoded
    complete: np.ndarray
