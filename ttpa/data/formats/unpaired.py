"""TRL's unpaired preference rows: one completion a row, good or bad, paired here with the others of its prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from ttpa.data.build import Example
from ttpa.data.formats.format import Place, RowFormat
from ttpa.data.formats.preference import check_chosen, read_columns
from ttpa.data.report import DataReport
from ttpa.errors import InputError

Found = tuple[Place, Example]


def read_row(row: dict[str, Any], place: Place, report: DataReport) -> Example:
    """The half of an example that a row with `prompt`, `completion` and `label` is: a good completion with nothing
    rejected, or a bad one with nothing chosen; prompt and completion are both texts or both lists of messages, and
    there may be `tools`, `chat_template_kwargs` and `id` as in preference rows. Raises InputError for a bad row."""
    label = row.get("label")
    if not isinstance(label, bool):
        raise InputError(f"the label must be true or false, not {label!r:.80}")
    rest = {name: part for name, part in row.items() if name != "label"}
    columns = read_columns(rest, ("prompt", "completion"), place, report)
    if "prompt" not in columns.sides:
        raise InputError("the prompt is missing, by which completions are paired")
    completion: Any = columns.sides["completion"]
    if label:
        check_chosen(completion, columns.tools, "completion")
    return Example(
        id=columns.id,
        where=columns.where,
        prompt=columns.sides["prompt"],
        chosen=completion if label else "",
        rejected=[] if label else [completion],
        tools=columns.tools or [],
        template_kwargs=columns.template_kwargs,
        origin=place.origin("unpaired preference"),
    )


def pair_rows(rows: Iterable[Found], report: DataReport) -> Iterator[Found]:
    """One example for every good completion, preferred to all bad ones of the same prompt, tools and template options,
    wherever in the file they stand. A completion without a partner is listed and dropped, and so is a row that comes
    twice."""
    groups: dict[str, list[Found]] = {}
    for place, half in rows:
        groups.setdefault(json.dumps([half.prompt, half.tools, half.template_kwargs]), []).append((place, half))
    for group in groups.values():
        good: dict[str, Found] = {}
        bad: dict[str, Example] = {}
        for place, half in group:
            side = json.dumps(half.rejected or half.chosen)
            if side in (bad if half.rejected else good):
                report.drop(half.id, half.where, "repeated row")
            elif half.rejected:
                bad[side] = half
            else:
                good[side] = (place, half)
        for _, half in good.values() if not bad else ():
            report.drop(half.id, half.where, "no partner", "no completion of this prompt is labelled false")
        for half in bad.values() if not good else ():
            report.drop(half.id, half.where, "no partner", "no completion of this prompt is labelled true")
        for place, half in good.values() if bad else ():
            yield place, replace(half, rejected=[worse.rejected[0] for worse in bad.values()])


UNPAIRED = RowFormat(
    "unpaired preference",
    "preferences",
    columns="prompt, completion, label",
    matches=lambda row: "completion" in row and "label" in row,
    read=read_row,
    gather=pair_rows,
)
