"""Calls that a row holds as text: a JSON object with name and arguments, or a list of them."""

from __future__ import annotations

from typing import Any

from ttpa.data.messages import Message
from ttpa.errors import InputError
from ttpa.tools.call import call_from_message, message_with_calls
from ttpa.tools.json_scan import scan

Repair = tuple[str, str]

LOOSE = "Python's quotes or words in a call read as JSON's"
TWICE = "a call as JSON text inside JSON read"


def message_of_calls(text: str) -> tuple[Message, list[Repair]]:
    """The message of the assistant that makes the calls which `text` holds, its arguments dicts, and the (repair,
    detail) of what was not plain JSON. Raises InputError where the text is anything but one call or a list of them."""
    read = scan(text)
    if read.error or read.root is None or text[read.end :].strip():
        position = read.error.position if read.error else read.end
        raise InputError(f"not the JSON of a call from character {position} on: {_short(text)}")
    value: Any = read.root.value
    repairs = [(LOOSE, _short(text))] if read.loose else []
    calls = []
    for record in value if isinstance(value, list) else [value]:
        if isinstance(record, str):
            message, more = message_of_calls(record)
            repairs += [(TWICE, _short(record)), *more]
            calls += [call_from_message(call) for call in message.get("tool_calls", [])]
        else:
            calls.append(call_from_message(record))
    if not calls:
        raise InputError(f"no call in {_short(text)}")
    return message_with_calls(calls), repairs


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
