"""ShareGPT rows with tools: Hermes function calling, APIGen-MT, glaive's re-release, LLaMA-Factory's SFT rows."""

from __future__ import annotations

import re
from typing import Any

from ttpa.data.dialogues import Dialogue
from ttpa.data.formats.format import Place, RowFormat
from ttpa.data.formats.turns import NO_SYSTEM_TEXT, RowReader, Unfit, read_turns, tools_in
from ttpa.data.messages import Message, calls_of
from ttpa.data.report import DataReport
from ttpa.errors import InputError
from ttpa.tools.dialects.hermes import HERMES, OPEN

COLUMNS = ("id", "conversations", "tools", "system")
TOOLS, TOOLS_END = "<tools>", "</tools>"
_RESULT = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)


def read_row(row: dict[str, Any], place: Place, report: DataReport) -> Dialogue | None:
    """The dialogue of a row: `conversations` of turns with from and value, optionally `tools` (a list or its JSON
    text), `system` and `id`. Calls are turns of function_call, whose value is their JSON, or stand in a gpt turn in
    `<tool_call>` as Hermes writes them; results are turns of observation or tool, several in one where each has its
    `<tool_response>`. A system text with `<tools>` gives the tools where the column does not, and is left out. A row
    with a tool or a call that cannot be read, or a call that names no tool, is listed and dropped; raises InputError
    for a row of another shape."""
    if "kto_tag" in row:
        raise InputError(
            "kto_tag says whether the answer is a good one, and dialogues hold good ones only: bring the rows as TRL's "
            "prompt, completion and label, which are paired by their prompts"
        )
    reader = RowReader(place.id_of(row), place, report)
    reader.note_unused(row, COLUMNS)
    turns = read_turns(row.get("conversations"))
    if row.get("system"):
        if not isinstance(row["system"], str):
            raise InputError(f"system must be text, not {row['system']!r:.80}")
        turns.insert(0, ("system", row["system"]))
    try:
        tools = reader.tools(row.get("tools"))
        messages: list[Message] = []
        for role, text in turns:
            if role == "system" and TOOLS in text:
                report.note(NO_SYSTEM_TEXT)
                tools = tools or reader.tools(_listed(text, reader), from_text=True)
            elif role == "function_call":
                messages.append(reader.call_text(text))
            elif role == "assistant" and OPEN in text:
                messages.append(reader.written(text, HERMES, tools))
            elif role == "tool":
                results = _RESULT.findall(text) or [text]
                messages += [{"role": "tool", "content": result.strip()} for result in results]
            else:
                messages.append({"role": role, "content": text})
        if any(call["name"] == "think" for call in calls_of(messages)):
            report.note("calls of the tool 'think' are kept: their argument is free text, which no model says exactly")
        return reader.dialogue(tools, messages)
    except Unfit as unfit:
        reader.drop(unfit)
        return None


def _listed(text: str, reader: RowReader) -> list[Any]:
    """The tools in the last `<tools>` of a system text: an earlier one is only spoken of."""
    start = text.rindex(TOOLS) + len(TOOLS)
    listed, end, repairs = tools_in(text, start)
    if not text[end:].lstrip().startswith(TOOLS_END):
        raise Unfit("a tool cannot be read", text[end : end + 80])
    reader.repairs.extend(repairs)
    return listed


SHARE_GPT = RowFormat(
    "share_gpt",
    "dialogues",
    columns="conversations, tools",
    matches=lambda row: "conversations" in row,
    read=read_row,
)
