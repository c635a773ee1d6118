"""glaive-function-calling-v2: a dialogue as one text, with calls after `<functioncall>`."""

from __future__ import annotations

import json
import re
from typing import Any

from ttpa.data.dialogues import Dialogue
from ttpa.data.formats.format import Place, RowFormat
from ttpa.data.formats.turns import NO_SYSTEM_TEXT, RowReader, Unfit, tools_in
from ttpa.data.messages import Message
from ttpa.data.report import DataReport
from ttpa.errors import InputError

CALL, END = "<functioncall>", "<|endoftext|>"
ROLES = {"USER": "user", "ASSISTANT": "assistant", "A": "assistant", "FUNCTION RESPONSE": "tool"}
_TURN = re.compile(r"^(USER|ASSISTANT|FUNCTION RESPONSE|(?<=\n\n)A):", re.MULTILINE)
_QUOTED = re.compile(r"""(\{\s*"name"\s*:\s*"[^"\\]*"\s*,\s*"arguments"\s*:\s*)'(.*)'\s*\}""", re.DOTALL)


def read_row(row: dict[str, Any], place: Place, report: DataReport) -> Dialogue | None:
    """The dialogue of a row: `system`, a text that ends with the tools if there are any, and `chat`, turns that begin
    with USER:, ASSISTANT: or FUNCTION RESPONSE: at the start of a line. The arguments of a call are JSON text in single
    quotes, which stand for nothing and are not escaped inside. A row with a tool or a call that cannot be read, or a
    call that names no tool, is listed and dropped; raises InputError for a row of another shape."""
    reader = RowReader(place.id_of(row), place, report)
    reader.note_unused(row, ("id", "system", "chat"))
    system, chat = row.get("system"), row.get("chat")
    if not isinstance(system, str | None) or not isinstance(chat, str):
        raise InputError("system and chat must be text")
    marks = _turn_marks(chat)
    if not marks or chat[: marks[0].start()].strip():
        raise InputError(f"the chat must begin with USER: or another turn, not with {chat[:40]!r}")
    try:
        messages, tools = _opening(system or "", reader)
        ends = [mark.start() for mark in marks[1:]] + [len(chat)]
        for mark, end in zip(marks, ends, strict=True):
            messages.append(_message(ROLES[mark[1]], chat[mark.end() : end].strip(), reader))
        return reader.dialogue(tools, messages)
    except Unfit as unfit:
        reader.drop(unfit)
        return None


def _turn_marks(chat: str) -> list[re.Match[str]]:
    """Where turns begin; A: inside an answer, which <|endoftext|> ends, is a part of it."""
    marks: list[re.Match[str]] = []
    for mark in _TURN.finditer(chat):
        answering = bool(marks) and ROLES[marks[-1][1]] == "assistant"
        if mark[1] != "A" or not answering or chat[marks[-1].end() : mark.start()].rstrip().endswith(END):
            marks.append(mark)
    return marks


def _opening(system: str, reader: RowReader) -> tuple[list[Message], list[dict[str, Any]]]:
    """The messages that the system text is, and the tools in it."""
    text = system.strip().removeprefix("SYSTEM:").strip()
    start = text.find("{")
    if start < 0:
        return [{"role": "system", "content": text}] if text else [], []
    listed, end, repairs = tools_in(text, start)
    if text[end:].strip():
        raise Unfit("a tool cannot be read", text[end : end + 80])
    reader.repairs.extend(repairs)
    reader.report.note(NO_SYSTEM_TEXT)
    return [], reader.tools(listed, from_text=True)


def _message(role: str, text: str, reader: RowReader) -> Message:
    text = text.removesuffix(END).strip()
    if role != "assistant":
        if CALL in text:
            raise Unfit("turns cannot be told apart", text[:80])
        return {"role": role, "content": text}
    before, *written = text.split(CALL)
    calls = []
    for call in written:
        if quoted := _QUOTED.fullmatch(call.strip()):
            call = f"{quoted[1]}{json.dumps(quoted[2])}}}"
        calls += reader.call_text(call.strip())["tool_calls"]
    return {"role": role, "content": before.strip(), **({"tool_calls": calls} if calls else {})}


GLAIVE = RowFormat(
    "glaive",
    "dialogues",
    columns="system, chat",
    matches=lambda row: isinstance(row.get("chat"), str),
    read=read_row,
)
