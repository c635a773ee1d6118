"""What the formats have in common whose rows hold two answers of one message each."""

from __future__ import annotations

import json
from typing import Any

from ttpa.data.build import Example
from ttpa.data.formats.turns import RowReader, Unfit
from ttpa.data.messages import Message, calls_of, tool_names

AS_TEXT = "rejected call that cannot be read kept as text"
"""The repair of a side to reject: a call that cannot be read is as bad as any."""


def example_of(
    reader: RowReader,
    prompt: list[Message],
    chosen: Message,
    rejected: Message,
    *,
    tools: list[dict[str, Any]],
    tools_known: bool = True,
) -> Example:
    """The example of a row, its repairs listed in the report. Raises Unfit where both sides are equal, and where a
    chosen call names no tool unless the tools are not known."""
    if json.dumps(chosen) == json.dumps(rejected):
        raise Unfit("identical", "chosen and rejected are equal")
    for call in calls_of([chosen]) if tools_known else ():
        if call["name"] not in tool_names(tools):
            raise Unfit("chosen call names no tool", call["name"])
    for repair, detail in reader.repairs:
        reader.report.repair(reader.id, str(reader.place), repair, detail)
    origin = {"format": reader.report.format, "file": reader.place.path.name, "line": reader.place.line}
    return Example(reader.id, str(reader.place), prompt, [chosen], [[rejected]], tools, {}, origin)
