"""ToolACE: turns of text with pythonic calls, `[Name With Spaces(a=1)]` (Team-ACE/ToolACE)."""

from __future__ import annotations

from typing import Any

from ttpa.data.dialogues import Dialogue
from ttpa.data.formats.format import Place, RowFormat
from ttpa.data.formats.turns import NO_SYSTEM_TEXT, RowReader, Unfit, read_turns, tools_in
from ttpa.data.messages import Message, calls_of
from ttpa.data.report import DataReport
from ttpa.errors import InputError
from ttpa.tools.dialects.pythonic import PYTHONIC

LISTS_TOOLS = "that you can invoke:"


def read_row(row: dict[str, Any], place: Place, report: DataReport) -> Dialogue | None:
    """The dialogue of a row: `system`, which lists the tools after "that you can invoke:", and `conversations`. What
    the system text says before that line is kept; how to write calls, which comes after the list, is not. A row with a
    tool or a call that cannot be read, or a call that names no tool, is listed and dropped; raises InputError for a row
    of another shape."""
    reader = RowReader(place.id_of(row), place, report)
    reader.note_unused(row, ("id", "system", "conversations"))
    before, marked, after = str(row.get("system")).rpartition(LISTS_TOOLS)
    if not marked:
        raise InputError(f"the system text lists no tools: it has no {LISTS_TOOLS!r}")
    turns = read_turns(row.get("conversations"))
    messages: list[Message] = []
    if kept := before.rpartition("\n")[0].strip():
        messages.append({"role": "system", "content": kept})
    try:
        listed, _, repairs = tools_in(after)
        reader.repairs.extend(repairs)
        tools = reader.tools(listed, from_text=True)
        for role, text in turns:
            if role == "assistant" and text.lstrip().startswith("["):
                messages.append(_message(text.strip(), tools, reader))
            else:
                messages.append({"role": role, "content": text})
        report.note(NO_SYSTEM_TEXT)
        return reader.dialogue(tools, messages)
    except Unfit as unfit:
        reader.drop(unfit)
        return None


def _message(text: str, tools: list[dict[str, Any]], reader: RowReader) -> Message:
    message = reader.written(text, PYTHONIC, tools)
    if not calls_of([message]) and text.endswith(")]"):
        raise Unfit("a call cannot be read", text[:80])
    return message


TOOLACE = RowFormat(
    "toolace",
    "dialogues",
    columns="system, conversations",
    matches=lambda row: "conversations" in row and isinstance(row.get("system"), str) and LISTS_TOOLS in row["system"],
    read=read_row,
)
