"""What the sampler did: how much it decoded, what came of it, and what was left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class SamplingReport:
    """Counters of a run. `exact_trunks` is None under the rule `release`, which has no trunks; `forks` counts forks by
    the field class they lie in, `duplicates` answers that say the same as an earlier one, `without_pair` decisions at
    which no wrong answer came up; `dropped` lists `{"id", "reason"}` of decisions that were left out."""

    decisions: int = 0
    trees: int = 0
    pairs: int = 0
    leaves: int = 0
    exact_trunks: int | None = None
    decoded_tokens: int = 0
    forks: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    without_pair: int = 0
    dropped: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def pairs_per_1000_tokens(self) -> float:
        """Pairs for every 1000 decoded tokens, 0 where nothing was decoded."""
        return 1000 * self.pairs / self.decoded_tokens if self.decoded_tokens else 0.0

    def drop(self, id: str, reason: str) -> None:
        """List one decision that was left out."""
        self.dropped.append({"id": id, "reason": reason})

    def to_dict(self) -> dict[str, Any]:
        """The report as one JSON object, with a counter by reason before the list of dropped decisions."""
        return {
            "decisions": self.decisions,
            "trees": self.trees,
            "pairs": self.pairs,
            "leaves": self.leaves,
            "exact_trunks": self.exact_trunks,
            "decoded_tokens": self.decoded_tokens,
            "pairs_per_1000_tokens": self.pairs_per_1000_tokens,
            "forks": dict(self.forks.most_common()),
            "duplicates": self.duplicates,
            "without_pair": self.without_pair,
            "dropped_by_reason": dict(Counter(entry["reason"] for entry in self.dropped)),
            "seconds": self.seconds,
            "dropped": self.dropped,
        }

    def table(self) -> str:
        """The counters as a short text table."""
        record = self.to_dict()
        names = ("decisions", "trees", "pairs", "leaves", "decoded_tokens")
        rows = [(name.replace("_", " "), str(record[name])) for name in names]
        rows.append(("pairs per 1000 decoded tokens", f"{self.pairs_per_1000_tokens:.1f}"))
        if self.exact_trunks is not None:
            rows.append(("exact trunks", str(self.exact_trunks)))
        rows += [(f"forks: {name}", str(number)) for name, number in record["forks"].items()]
        rows += [("duplicates", str(self.duplicates)), ("without a pair", str(self.without_pair))]
        rows += [(f"dropped: {reason}", str(number)) for reason, number in record["dropped_by_reason"].items()]
        rows.append(("seconds", f"{self.seconds:.1f}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {number:>8}" for name, number in rows)
