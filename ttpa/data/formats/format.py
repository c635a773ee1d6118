"""What a format of rows is: how to tell it, and how one of its rows becomes a dialogue or an example."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ttpa.config import nearest
from ttpa.data.build import Example
from ttpa.data.dialogues import Dialogue
from ttpa.data.report import DataReport
from ttpa.errors import InputError


@dataclass(frozen=True)
class Place:
    """Where a row stands: its file and its line from 1 (in Parquet the row)."""

    path: Path
    line: int

    @property
    def id(self) -> str:
        """The id of a row that has none of its own."""
        return f"{self.path.stem}:{self.line}"

    @property
    def arrow(self) -> bool:
        """Whether the row comes from Arrow, which gives every object of a column the keys of all others, with null."""
        return self.path.suffix == ".parquet"

    def id_of(self, row: dict[str, Any]) -> str:
        """The id of a row, its own if it has one."""
        return self.id if row.get("id") is None else str(row["id"])

    def origin(self, name: str) -> dict[str, Any]:
        """What an example or a dialogue of the format of that name keeps of where it came from."""
        return {"format": name, "file": self.path.name, "line": self.line}

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


def check_columns(row: dict[str, Any], columns: Collection[str], report: DataReport, *, accepted: str = "") -> None:
    """Note the columns of a row that are none of `columns`; raises InputError, which ends with `accepted`, for one that
    is nearly one of those the row does not have."""
    for name in row:
        if name not in columns:
            close = nearest(name, columns, cutoff=0.85)
            if close and close not in row:
                raise InputError(f"unknown column {name!r}: did you mean {close!r}? {accepted}".rstrip())
            report.note(f"column {name!r} is not used")


@dataclass(frozen=True)
class RowFormat:
    """A format of rows. `kind` says what it holds: dialogues (tools, messages and the right calls), preferences (a
    prompt, a better and a worse answer), or evaluation, rows on which nothing may be trained. `columns` names what a
    row has, for messages. `matches(row)` tells whether the first row of a file is of this format. `read(row, place,
    report)` gives the dialogue or example of a row, or None where it listed in the report why the row is left out;
    what it did not take as it stands it lists as a repair; it raises InputError for anything that the format does not
    know. `gather(examples, report)`, of a format whose examples take several rows, makes them of what `read` gave for
    all rows of a file."""

    name: str
    kind: Literal["dialogues", "preferences", "evaluation"]
    columns: str
    matches: Callable[[dict[str, Any]], bool]
    read: Callable[[dict[str, Any], Place, DataReport], Dialogue | Example | None]
    gather: Callable[[Iterable[tuple[Place, Example]], DataReport], Iterator[tuple[Place, Example]]] | None = None
