"""Two evaluations of the same decisions: what the training changed, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ttpa.errors import InputError
from ttpa.evaluation.calls import Evaluation
from ttpa.evaluation.intervals import mean_interval, wilson


@dataclass(frozen=True)
class Comparison:
    """Differences after minus before over the same decisions. `points` and `interval` (95 %) are percentage points of
    exact calls, `gained` decisions became exact and `lost` ones ceased to be; `score` and `score_interval` (95 %) are
    the difference of the mean ESM score."""

    decisions: int
    points: float
    interval: tuple[float, float]
    gained: int
    lost: int
    score: float
    score_interval: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as one JSON object."""
        return {
            "decisions": self.decisions,
            "points": self.points,
            "interval": list(self.interval),
            "gained": self.gained,
            "lost": self.lost,
            "esm_score": self.score,
            "esm_score_interval": list(self.score_interval),
        }


def compare(before: Evaluation, after: Evaluation) -> Comparison:
    """The paired difference of two evaluations, decision by decision, with 95 % intervals by the normal approximation
    (`intervals.mean_interval`). Raises InputError where they are not evaluations of the same decisions or empty."""
    first = {outcome.id: outcome for outcome in before.outcomes}
    second = {outcome.id: outcome for outcome in after.outcomes}
    if not first or first.keys() != second.keys():
        raise InputError(
            f"two evaluations are compared decision by decision, and these have {len(first)} and {len(second)} "
            f"decisions, {len(first.keys() & second.keys())} in common; evaluate both models on the same dialogues"
        )
    pairs = [(first[id], second[id]) for id in first]
    changes = [after.exact - before.exact for before, after in pairs]
    mean, low, high = mean_interval(changes)
    score, score_low, score_high = mean_interval([after.score - before.score for before, after in pairs])
    return Comparison(
        decisions=len(pairs),
        points=100 * mean,
        interval=(100 * low, 100 * high),
        gained=changes.count(1),
        lost=changes.count(-1),
        score=score,
        score_interval=(score_low, score_high),
    )


def comparison_table(before: Evaluation, after: Evaluation) -> str:
    """A text table with the columns before, after and difference and the rows exact calls (with 95 % intervals), ESM
    score, each split where there are several, and the errors by code. Raises InputError as `compare`."""
    rows = [("", "before", "after", "difference"), *_rows("exact calls, %", before, after)]
    before_parts, after_parts = before.splits(), after.splits()
    if len(before_parts) > 1:
        for name, part in before_parts.items():
            rows += _rows(f"exact calls, %: {name}", part, after_parts[name])[:1]
    old, new = before.errors, after.errors
    for code in sorted(old.keys() | new.keys(), key=lambda code: (-old.get(code, 0), code)):
        was, now = old.get(code, 0), new.get(code, 0)
        rows.append((code, str(was), str(now), f"{now - was:+d}"))
    return _aligned(rows)


def evaluation_table(evaluation: Evaluation) -> str:
    """A text table of one evaluation: exact calls (with a 95 % interval), ESM score, each split where there are
    several, and the errors by code."""
    rows = [("decisions", str(len(evaluation.outcomes)))]
    if evaluation.outcomes:
        rows += [("exact calls, %", _share(evaluation)), ("ESM score", f"{evaluation.score:.4f}")]
    parts = evaluation.splits()
    if len(parts) > 1:
        rows += [(f"exact calls, %: {name}", _share(part)) for name, part in parts.items()]
    return _aligned([*rows, *((code, str(number)) for code, number in evaluation.errors.items())])


def _rows(label: str, before: Evaluation, after: Evaluation) -> list[tuple[str, ...]]:
    c = compare(before, after)
    points = f"{c.points:+.1f} [{c.interval[0]:+.1f}, {c.interval[1]:+.1f}]"
    score = f"{c.score:+.4f} [{c.score_interval[0]:+.4f}, {c.score_interval[1]:+.4f}]"
    return [
        (label, _share(before), _share(after), points),
        ("ESM score", f"{before.score:.4f}", f"{after.score:.4f}", score),
    ]


def _share(part: Evaluation) -> str:
    low, high = wilson(part.exact, len(part.outcomes))
    return f"{100 * part.exact / len(part.outcomes):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]))
    return "\n".join(lines)
