"""What formats have in common that hold dialogues as turns of text: from and value, tools and calls in the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ttpa.data.dialogues import Dialogue
from ttpa.data.formats.call_text import message_of_calls
from ttpa.data.formats.format import Place
from ttpa.data.messages import Message, calls_of, tool_names
from ttpa.data.report import DataReport
from ttpa.data.schemas import Repair, read_tools
from ttpa.errors import InputError
from ttpa.tools.call import Call, message_with_calls
from ttpa.tools.dialects.dialect import Dialect
from ttpa.tools.json_scan import scan
from ttpa.tools.schema import functions

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
_GAP = re.compile(r"[\s,]*")
NO_SYSTEM_TEXT = "the system text that lists tools and how to write calls is left out: the chat template writes both"


class Unfit(Exception):
    """A row of the right format with something in it that cannot be used; it says (reason, detail)."""


@dataclass(frozen=True)
class RowReader:
    """Makes the dialogue of one row. What was not taken as it stands is listed in the report with the dialogue: a row
    that is dropped is listed as that alone."""

    id: str
    place: Place
    report: DataReport
    repairs: list[Repair] = field(default_factory=list)

    def note_unused(self, row: dict[str, Any], used: Sequence[str]) -> None:
        """Note the columns that the format does not have."""
        for name in row:
            if name not in used:
                self.report.note(f"column {name!r} is not used")

    def tools(self, value: Any, *, from_text: bool = False) -> list[dict[str, Any]]:
        """OpenAI tools, out of a column of the row or out of its text; raises Unfit for schemas that are none even
        then."""
        tools, repairs = read_tools(value, arrow=self.place.arrow and not from_text)
        self.repairs.extend(repairs)
        try:
            functions(tools)
        except InputError as error:
            raise Unfit("a tool has no valid schema", str(error)) from None
        return tools

    def call_text(self, text: str) -> Message:
        """The message that makes the calls whose JSON `text` is; raises Unfit where it is none."""
        try:
            message, repairs = message_of_calls(text)
        except InputError as error:
            raise Unfit("a call cannot be read", str(error)) from None
        self.repairs.extend(repairs)
        return message

    def written(self, text: str, dialect: Dialect, tools: list[dict[str, Any]]) -> Message:
        """The assistant's message that `text` is in the dialect; raises Unfit where a call in it cannot be read."""
        turn = dialect.read(text, tools)
        for error in turn.errors:
            if error.code == "format.unparseable":
                raise Unfit("a call cannot be read", f"{error.message}: {text[slice(*error.span)]:.80}")
        calls = []
        for call in turn.calls:
            if call.name is None or call.arguments is None:
                raise Unfit("a call cannot be read", f"{text[slice(*(call.span or (0, 0)))]:.80}")
            calls.append(Call(call.name, call.arguments))
            self.repairs.extend(("of a key that comes twice the last value is kept", key) for key, _ in call.duplicates)
        self.repairs.extend((error.message, f"{text[slice(*error.span)]:.80}") for error in turn.errors)
        return message_with_calls(calls, turn.content)

    def dialogue(
        self, tools: list[dict[str, Any]], messages: list[Message], source: dict[str, Any] | None = None
    ) -> Dialogue:
        """The dialogue, which came from this row if no other source is given; raises Unfit where a call names none of
        the tools."""
        offered = tool_names(tools)
        for call in calls_of(messages):
            if call["name"] not in offered:
                raise Unfit("a call names no tool", call["name"])
        for repair, detail in self.repairs:
            self.report.repair(self.id, str(self.place), repair, detail)
        if source is None:
            source = self.place.origin(self.report.format)
        return Dialogue(self.id, tools, messages, source)

    def drop(self, unfit: Unfit) -> None:
        """List the row as left out."""
        self.report.drop(self.id, str(self.place), *unfit.args)


def read_turns(value: Any) -> list[tuple[str, str]]:
    """The (role, text) of each turn of a `conversations` column, roles as OpenAI names them besides function_call;
    raises InputError for anything else."""
    if not isinstance(value, list) or not value:
        raise InputError("conversations must be a non-empty list of turns")
    turns = []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise InputError(f"turn {index} must be an object with from and value, both text: {turn!r:.80}")
        role = turn.get("from")
        if not isinstance(role, str) or role not in ROLES:
            raise InputError(f"turn {index}: from must be one of {', '.join(ROLES)}, not {role!r:.80}")
        turns.append((ROLES[role], turn["value"]))
    return turns


def tools_in(text: str, start: int = 0) -> tuple[list[Any], int, list[Repair]]:
    """The objects that stand in `text` from `start` on, one after the other or in lists, where they end, and the
    repair if they are written with Python's quotes or words. Raises Unfit where one breaks off."""
    found: list[Any] = []
    repairs: list[Repair] = []
    at = _after_gap(text, start)
    while text[at : at + 1] in ("[", "{"):
        read = scan(text, at)
        if read.error or read.root is None:
            position = read.error.position if read.error else at
            raise Unfit("a tool cannot be read", text[position : position + 80])
        if read.loose and not repairs:
            repairs.append(("tools in Python's quotes or words", text[slice(*read.loose[0])]))
        found += read.root.value if isinstance(read.root.value, list) else [read.root.value]
        at = _after_gap(text, read.end)
    return found, at, repairs


def _after_gap(text: str, at: int) -> int:
    return _GAP.match(text, at).end()  # type: ignore[union-attr]  # matches the empty text
