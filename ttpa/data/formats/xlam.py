"""xLAM and APIGen: a query, tools and the calls that answer it (Salesforce/xlam-function-calling-60k)."""

from __future__ import annotations

import json
from typing import Any

from ttpa.data.dialogues import Dialogue
from ttpa.data.formats.format import Place, RowFormat
from ttpa.data.formats.turns import RowReader, Unfit
from ttpa.data.messages import Message, without_nulls
from ttpa.data.report import DataReport
from ttpa.errors import InputError

COLUMNS = ("id", "query", "tools", "answers")


def read_row(row: dict[str, Any], place: Place, report: DataReport) -> Dialogue | None:
    """The dialogue of a row: `query`, `tools` and `answers`, the last two lists or their JSON text, the parameters of a
    tool a flat map of names. Without answers nothing is to be called, and the dialogue ends with the query. A row whose
    tools are no schemas or whose answers cannot be read or name no tool is listed and dropped; raises InputError for a
    row of another shape."""
    reader = RowReader(place.id_of(row), place, report)
    query, answers = row.get("query"), row.get("answers")
    if not isinstance(query, str) or not isinstance(answers, str | list):
        raise InputError(
            f"not an xLAM row: query must be text, answers a list or its JSON text; it has {', '.join(row)}"
        )
    reader.note_unused(row, COLUMNS)
    messages: list[Message] = [{"role": "user", "content": query}]
    if isinstance(answers, list) and place.arrow and answers != (answers := without_nulls(answers)):
        reader.repairs.append(("null arguments left out", ""))
    text = answers if isinstance(answers, str) else json.dumps(answers)
    try:
        tools = reader.tools(row.get("tools"))
        if text.strip() not in ("", "[]"):
            messages.append(reader.call_text(text))
        return reader.dialogue(tools, messages)
    except Unfit as unfit:
        reader.drop(unfit)
        return None


XLAM = RowFormat(
    "xlam",
    "dialogues",
    columns="query, tools, answers",
    matches=lambda row: "query" in row and "answers" in row,
    read=read_row,
)
