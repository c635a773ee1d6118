"""Chats in the OpenAI format: our own dialogues, those of other tools, and When2Call's rows for supervised training."""

from __future__ import annotations

from typing import Any

from ttpa.data.dialogues import Dialogue
from ttpa.data.formats.format import Place, RowFormat, check_columns
from ttpa.data.formats.turns import RowReader, Unfit
from ttpa.data.messages import (
    Message,
    calls_of,
    check_call_names,
    checked_messages,
    with_dict_arguments,
    with_tool_calls,
    without_null_arguments,
)
from ttpa.data.report import DataReport
from ttpa.data.schemas import read_tools
from ttpa.errors import InputError
from ttpa.tools.schema import functions

COLUMNS = ("id", "tools", "messages", "source", "functions")
OPEN, CLOSE = "<TOOLCALL>", "</TOOLCALL>"


def read_row(row: dict[str, Any], place: Place, report: DataReport) -> Dialogue | None:
    """The dialogue of a row: `messages` in the OpenAI format, legacy forms too, `tools` or the older `functions` (a
    list or its JSON text), optionally `id` and `source`. Raises InputError for a bad row: messages or tools of another
    shape, tools that are no function schemas, a call that names no tool or whose arguments are no object. When2Call
    writes calls as `<TOOLCALL>[..]</TOOLCALL>` into a content; a row in which such a call cannot be read or names no
    tool is listed and dropped."""
    check_columns(row, COLUMNS, report)
    id = place.id if row.get("id") is None else row["id"]
    if not isinstance(id, str | int):
        raise InputError(f"the id must be text, not {id!r:.80}")
    reader = RowReader(str(id), place, report)
    tools, repairs = read_tools(row.get("functions") if row.get("tools") is None else row["tools"], arrow=place.arrow)
    functions(tools)
    reader.repairs.extend(repairs)
    messages, repairs = with_tool_calls(row.get("messages"), "messages")
    messages = checked_messages(messages, "messages")
    reader.repairs.extend(repairs)
    if place.arrow:
        messages, repairs = without_null_arguments(messages)
        reader.repairs.extend(repairs)
    messages, repairs = with_dict_arguments(messages)
    for _, detail in repairs:
        if any(isinstance(call["arguments"], str) for call in calls_of(messages)):
            raise InputError(detail)
    reader.repairs.extend(repairs)
    check_call_names(messages, tools, "the dialogue")
    try:
        messages = [_with_written_calls(message, reader) for message in messages]
        return reader.dialogue(tools, messages, _source(row.get("source")))
    except Unfit as unfit:
        reader.drop(unfit)
        return None


def _source(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict | None) else {"source": value}


def _with_written_calls(message: Message, reader: RowReader) -> Message:
    """The message, with calls that stand as text in its content as calls; raises Unfit where they cannot be read."""
    text = message["content"].strip()
    if message["role"] != "assistant" or not (text.startswith(OPEN) and text.endswith(CLOSE)):
        return message
    calling = reader.call_text(text.removeprefix(OPEN).removesuffix(CLOSE))
    reader.repairs.append((f"{OPEN} in a content read as calls", text[:80]))
    return {**message, **calling}


CHAT = RowFormat("chat", "dialogues", columns="messages, tools", matches=lambda row: "messages" in row, read=read_row)
