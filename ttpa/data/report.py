"""The data report: what was read, kept, dropped and repaired, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttpa.files import atomic_write


@dataclass
class DataReport:
    """What a reader did with a file or folder. `read` counts what `unit` names, `kept` what `kind` names; each entry of
    `dropped` and `repaired` has the id, the place (file:line), a reason out of a small set, and what is particular to
    it; `counts` holds what else a format counts and `notes` what the user should know of the whole."""

    path: str
    format: str
    kind: str = "trees"
    unit: str = "rows"
    read: int = 0
    kept: int = 0
    dropped: list[dict[str, str]] = field(default_factory=list)
    repaired: list[dict[str, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, id: str, where: str, reason: str, detail: str = "") -> None:
        """List one thing that was left out."""
        self.dropped.append({"id": id, "where": where, "reason": reason, "detail": detail})

    def repair(self, id: str, where: str, repair: str, detail: str = "") -> None:
        """List one thing that was not used as it stands in the file."""
        self.repaired.append({"id": id, "where": where, "repair": repair, "detail": detail})

    def count(self, name: str) -> None:
        """Add one to a counter of the format."""
        self.counts[name] = self.counts.get(name, 0) + 1

    def note(self, text: str) -> None:
        """Say something about the whole file, once."""
        if text not in self.notes:
            self.notes.append(text)

    @classmethod
    def joined(cls, reports: Sequence[DataReport]) -> DataReport:
        """The report of several files: numbers are added up, lists stand one after the other."""
        if len(reports) == 1:
            return reports[0]

        def distinct(values: Iterable[str]) -> str:
            return ", ".join(dict.fromkeys(values))

        whole = cls(
            path=", ".join(report.path for report in reports),
            format=distinct(report.format for report in reports),
            kind=distinct(report.kind for report in reports),
            unit=distinct(report.unit for report in reports),
        )
        for report in reports:
            whole.read, whole.kept = whole.read + report.read, whole.kept + report.kept
            whole.dropped += report.dropped
            whole.repaired += report.repaired
            for name, number in report.counts.items():
                whole.counts[name] = whole.counts.get(name, 0) + number
            for text in report.notes:
                whole.note(text)
        return whole

    def to_dict(self) -> dict[str, Any]:
        """The report as one JSON object, with counters by reason before the lists."""
        return {
            "path": self.path,
            "format": self.format,
            "kind": self.kind,
            "unit": self.unit,
            "read": self.read,
            "kept": self.kept,
            "counts": self.counts,
            "dropped_by_reason": dict(Counter(entry["reason"] for entry in self.dropped)),
            "repaired_by_kind": dict(Counter(entry["repair"] for entry in self.repaired)),
            "notes": self.notes,
            "dropped": self.dropped,
            "repaired": self.repaired,
        }

    def save(self, path: Path | str) -> None:
        """Write the report as indented JSON, under a temporary name that is renamed to `path`."""
        with atomic_write(path) as file:
            file.write(json.dumps(self.to_dict(), ensure_ascii=False, indent=2) + "\n")

    def table(self) -> str:
        """The counters as a short text table."""
        record = self.to_dict()
        rows = [(f"{self.unit} read", self.read), *self.counts.items()]
        rows += [(f"dropped: {reason}", number) for reason, number in record["dropped_by_reason"].items()]
        rows += [(f"repaired: {kind}", number) for kind, number in record["repaired_by_kind"].items()]
        rows.append((f"{self.kind} kept", self.kept))
        width = max(len(name) for name, _ in rows)
        lines = [f"{self.path} ({self.format})"] + [f"  {name:<{width}}  {number:>8}" for name, number in rows]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])
