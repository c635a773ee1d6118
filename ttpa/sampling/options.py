"""The options of the sampler."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

from ttpa.config import nearest
from ttpa.errors import InputError

Mode = Literal["tps", "release"]
RuleName = Literal["entropy", "gap", "surprise", "change", "varentropy"]
ForkOrder = Literal["best", "first"]
TOP = 20
"""How many of the likeliest tokens are kept at each position, the path's own among them: forks choose from these."""

MAX_TOP = 64
"""How many of the likeliest tokens a filter can choose from."""

NAMES = {"mode": Mode, "rule": RuleName, "fork_order": ForkOrder}
AT_LEAST = {
    0: "num_forks min_entropy min_probability min_ratio temperature seed",
    1: "alternatives min_distance max_depth max_tree_tokens max_tree_pages num_samples max_new_tokens top_k rows",
    2: "max_leaves",
}
AT_MOST = {1: "min_probability min_ratio top_p min_p", TOP - 1: "alternatives", MAX_TOP: "top_k"}
ABOVE_0 = "top_p min_p cache_gb"
FILTERS = "top_k top_p min_p"


@dataclass(frozen=True)
class SamplingOptions:
    """How preference trees are sampled; raises InputError, naming the option, for values that make no sense.

    Mode `tps` decodes a trunk, forks it at up to `num_forks` places with up to `alternatives` other tokens each, and
    completes every fork. Places are at least `min_distance` tokens apart; the floors `min_entropy` (nats),
    `min_probability` (of an alternative) and `min_ratio` (of an alternative to the path's token) and the scores of
    `rule` say which (ttpa.sampling.rules). Under `fork_order` best they are the places of a finished path with the
    highest scores, under first the first candidates, forked while the path is being written. With `max_depth` 2 and
    more branches are forked in the same way, behind their own fork. A tree has at most `max_leaves` leaves, its trunk
    included, and where given at most `max_tree_tokens` new tokens and `max_tree_pages` pages of cache. Mode `release`,
    the baseline, draws `num_samples` independent answers instead.

    Answers have at most `max_new_tokens` tokens, and end at the text `stop` too. At `temperature` 0 tokens are the
    likeliest ones (in mode release 0 means 1); above, they are drawn, from what `top_k`, `top_p` and `min_p` leave,
    with noise that depends on `seed`, tree, path and position alone. `draft` lets branches verify what the trunk goes
    on with. `rows` paths are decoded side by side with `cache_gb` GiB of cache (None: 1 on a CPU, a share of the free
    memory of a GPU).
    """

    mode: Mode = "tps"
    rule: RuleName = "entropy"
    num_forks: int = 8
    alternatives: int = 2
    min_distance: int = 1
    min_entropy: float = 0.1
    min_probability: float = 0.02
    min_ratio: float = 0.05
    fork_order: ForkOrder = "best"
    max_leaves: int = 16
    max_depth: int = 1
    max_tree_tokens: int | None = None
    max_tree_pages: int | None = None
    num_samples: int = 5
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: str | None = None
    draft: bool = True
    rows: int = 64
    cache_gb: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, literal in NAMES.items():
            value, choices = getattr(self, name), typing.get_args(literal)
            if value not in choices:
                close = nearest(str(value), choices)
                hint = f": did you mean {close}?" if close else ""
                raise InputError(f"{name} must be one of {', '.join(choices)}, not {value!r}{hint}")
        for least, names in AT_LEAST.items():
            for name, value in self._given(names):
                if not least <= value < math.inf:
                    raise InputError(f"{name} must be a number of at least {least}, not {value}")
        for name, value in self._given(ABOVE_0):
            if not 0 < value < math.inf:
                raise InputError(f"{name} must be a number above 0, not {value}")
        for most, names in AT_MOST.items():
            for name, value in self._given(names):
                if value > most:
                    raise InputError(f"{name} must be at most {most}, not {value}")
        if self.max_tree_tokens is not None and self.max_tree_tokens < self.max_new_tokens:
            raise InputError(
                f"max_tree_tokens is {self.max_tree_tokens}, and a trunk may have {self.max_new_tokens} new tokens: "
                "raise it, or lower max_new_tokens"
            )
        if not self.draw_temperature:
            for name, _ in self._given(FILTERS):
                raise InputError(f"{name} filters draws, and at temperature 0 nothing is drawn: give a temperature")
        if self.stop == "":
            raise InputError("stop is empty, so that every answer would end at once: give a text, or none")

    @property
    def draw_temperature(self) -> float:
        """The temperature of draws in this mode, 0 where the likeliest token is taken."""
        return self.temperature or (1.0 if self.mode == "release" else 0.0)

    def _given(self, names: str) -> list[tuple[str, Any]]:
        """Those of some options that are not None, with their values."""
        return [(name, getattr(self, name)) for name in names.split() if getattr(self, name) is not None]
