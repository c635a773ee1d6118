"""What the sampler did: how much it computed, what came of it, and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

COUNTERS = ("forks", "dropped_forks")
DERIVED = ("pairs_per_1000_tokens", "dropped_by_reason")


@dataclass
class SamplingReport:
    """Counters of a run.

    `pairs` are usable pairs: two different answers, one exact and one wrong. `exact_trunks` is None in mode release,
    which has no trunks; `duplicates` are answers that say the same as an earlier one, `without_pair` decisions at which
    no wrong answer came up. Of the prompts' tokens `prefilled_tokens` were computed and `shared_prompt_tokens` found in
    the cache; `decoded_tokens` are the new tokens of all paths, shared beginnings counted once; of `verified_tokens`,
    fed as drafts, `accepted_tokens` were what the model would write; `passes` are model passes after the prompts;
    `incomplete_draws` are answers with a draw from fewer tokens than its filter would have kept.
    `forks` counts places that were forked by field class, `dropped_forks` branches that were not taken by reason;
    `dropped` lists `{"id", "reason"}` of decisions that were left out. `seconds` are wall time.
    """

    decisions: int = 0
    trees: int = 0
    pairs: int = 0
    leaves: int = 0
    exact_trunks: int | None = None
    duplicates: int = 0
    without_pair: int = 0
    prefilled_tokens: int = 0
    shared_prompt_tokens: int = 0
    decoded_tokens: int = 0
    verified_tokens: int = 0
    accepted_tokens: int = 0
    passes: int = 0
    incomplete_draws: int = 0
    forks: Counter[str] = field(default_factory=Counter)
    dropped_forks: Counter[str] = field(default_factory=Counter)
    dropped: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def pairs_per_1000_tokens(self) -> float:
        """Usable pairs for every 1,000 decoded tokens, 0 where nothing was decoded."""
        return 1000 * self.pairs / self.decoded_tokens if self.decoded_tokens else 0.0

    def drop(self, id: str, reason: str) -> None:
        """List one decision that was left out."""
        self.dropped.append({"id": id, "reason": reason})

    @classmethod
    def merge(cls, reports: Iterable[SamplingReport]) -> SamplingReport:
        """The report of parts of one run: sums, lists in the order of the parts. `seconds` are summed as well, also
        where parts ran at the same time; `exact_trunks` is None where it is None in every part."""
        merged = cls()
        for report in reports:
            for name in [f.name for f in fields(cls)]:
                so_far, more = getattr(merged, name), getattr(report, name)
                if more is not None:
                    setattr(merged, name, more if so_far is None else so_far + more)
        return merged

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> SamplingReport:
        """The inverse of `to_dict`; raises TypeError on unknown fields."""
        counters = {name: Counter(record[name]) for name in COUNTERS}
        return cls(**{name: value for name, value in record.items() if name not in DERIVED} | counters)

    def to_dict(self) -> dict[str, Any]:
        """The report as one JSON object: its fields, and the pairs per 1,000 decoded tokens and the number of dropped
        decisions by reason beside them."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            **record,
            **{name: dict(record[name].most_common()) for name in COUNTERS},
            "pairs_per_1000_tokens": self.pairs_per_1000_tokens,
            "dropped_by_reason": dict(Counter(entry["reason"] for entry in self.dropped)),
        }

    def table(self) -> str:
        """The counters as a short text table that ends with what came of the run."""
        record = self.to_dict()
        rows = [("decisions", str(self.decisions))]
        rows += [(f"dropped: {reason}", str(number)) for reason, number in record["dropped_by_reason"].items()]
        rows += [("without a pair", str(self.without_pair)), ("trees", str(self.trees)), ("leaves", str(self.leaves))]
        rows.append(("duplicates", str(self.duplicates)))
        if self.exact_trunks is not None:
            rows.append(("exact trunks", str(self.exact_trunks)))
        for name in ("prefilled", "shared_prompt", "decoded", "verified", "accepted"):
            rows.append((f"{name} tokens".replace("_", " "), str(record[f"{name}_tokens"])))
        rows += [("passes", str(self.passes)), ("seconds", f"{self.seconds:.1f}"), ("usable pairs", str(self.pairs))]
        rows.append(("pairs per 1,000 decoded tokens", f"{self.pairs_per_1000_tokens:.1f}"))
        rows += [(f"forks: {name}", str(number)) for name, number in record["forks"].items()]
        rows += [(f"forks dropped: {reason}", str(number)) for reason, number in record["dropped_forks"].items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {number:>8}" for name, number in rows)
