"""Paths made by hand, for the rules and the forks."""

from __future__ import annotations

import math

import numpy as np

from ttpa.sampling.decoded import Decoded


def decoded(*steps, varentropy=None):
    """Steps (entropy, [(token, probability), ..]), the likeliest token first; the path takes the first one."""
    return Decoded(
        ids=[likely[0][0] for _, likely in steps],
        finish="stop",
        logps=[math.log(likely[0][1]) for _, likely in steps],
        entropy=[entropy for entropy, _ in steps],
        varentropy=[0.0] * len(steps) if varentropy is None else list(varentropy),
        top_ids=np.array([[token for token, _ in likely] for _, likely in steps]),
        top_probabilities=np.array([[p for _, p in likely] for _, likely in steps], dtype=np.float32),
    )
