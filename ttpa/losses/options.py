"""What a loss may be told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ttpa.errors import InputError

VALID: list[tuple[str, Callable[[float], bool], str]] = [
    ("a number above 0", lambda x: x > 0, "beta discopop_tau likelihood_temperature"),
    ("a number of at least 0", lambda x: x >= 0, "simpo_gamma tdpo_alpha tis_mu tgdpo_alpha"),
    ("a number above 0 and at most 1", lambda x: 0 < x <= 1, "d2po_gamma sepo_ratio"),
    ("a number from 0 to 1", lambda x: 0 <= x <= 1, "ld_alpha"),
    ("a share of at least 0 and below 0.5", lambda x: 0 <= x < 0.5, "label_smoothing"),
    ("a number", lambda x: True, "tis_min tis_max"),
]


@dataclass(frozen=True)
class LossOptions:
    """The numbers in the equations of the losses; `describe(name).options` lists those that a loss reads, the functions
    in `weights`, `margin`, `sides` and `likelihood` say what they do. Names are TRL's where TRL has the option. Raises
    InputError, naming the option, for a value outside its range."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    ld_alpha: float = 0.5
    tdpo_alpha: float = 0.5
    tis_mu: float = 1.0
    tis_min: float = -0.5
    tis_max: float = 1.5
    tgdpo_alpha: float = 0.5
    d2po_gamma: float = 0.98
    sepo_ratio: float = 0.3
    discopop_tau: float = 0.05
    likelihood_temperature: float = 1.0

    def __post_init__(self) -> None:
        for wanted, valid, names in VALID:
            for name in names.split():
                value = getattr(self, name)
                if not math.isfinite(value) or not valid(value):
                    raise InputError(f"--{name} must be {wanted}, not {value}")
        if self.tis_min > self.tis_max:
            raise InputError(f"--tis_min {self.tis_min} must not be above --tis_max {self.tis_max}")
