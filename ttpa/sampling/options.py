"""The options of the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SamplingOptions:
    """How preference trees are sampled.

    Rule `tps` decodes a trunk greedily, forks it at up to `num_forks` places with up to `alternatives` other tokens
    each, and completes every fork greedily; places are at least `min_distance` tokens apart and have an entropy of
    `min_entropy` nats, an alternative of probability `min_probability`, and of `min_ratio` times the probability of
    the trunk's token, or more. Rule `release`, the baseline, draws `num_samples` independent answers at temperature 1
    from `seed`. Answers end after `max_new_tokens`; `batch_size` rows are decoded at once.
    """

    rule: Literal["tps", "release"] = "tps"
    num_forks: int = 8
    alternatives: int = 2
    min_distance: int = 1
    min_entropy: float = 0.1
    min_probability: float = 0.02
    min_ratio: float = 0.05
    num_samples: int = 8
    max_new_tokens: int = 256
    batch_size: int = 64
    seed: int = 0
