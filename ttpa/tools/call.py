"""A tool call: a name and its arguments."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ttpa.errors import InputError
from ttpa.tools.json_scan import scan


@dataclass(frozen=True)
class Call:
    """One call of a tool: its name, and its arguments as a dict of JSON values."""

    name: str
    arguments: dict[str, Any]

    def normal(self) -> str:
        """The call as canonical JSON text: two calls are the same call exactly if these texts are equal.

        Keys are sorted at all depths and a float without a fraction is written as an integer (1.0 equals 1). A bool
        differs from a number, the order of lists counts.
        """
        return normal_json({"name": self.name, "arguments": self.arguments})

    def to_dict(self) -> dict[str, Any]:
        """The bare record `{"name", "arguments"}`."""
        return {"name": self.name, "arguments": self.arguments}


def normal_json(value: Any) -> str:
    """Canonical text of a JSON value, by the rules of `Call.normal`; equal texts mean equal values."""
    return json.dumps(_integral(value), sort_keys=True)


def call_from_message(tool_call: dict[str, Any]) -> Call:
    """Read a call from an OpenAI `{"type": "function", "function": {...}}` record or a bare `{"name", "arguments"}`.

    `arguments` may be a dict or its JSON text. Raises InputError that says what is wrong with anything else.
    """
    record = tool_call.get("function", tool_call) if isinstance(tool_call, dict) else tool_call
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        raise InputError(f'a tool call must be an object with a "name", got {_short(tool_call)}')
    name, arguments = record["name"], record.get("arguments")
    if isinstance(arguments, str):
        read = scan(arguments)
        if read.error or read.loose or read.root is None or arguments[read.end :].strip():
            position = read.error.position if read.error else read.loose[0][0] if read.loose else read.end
            raise InputError(f"arguments of {name!r} are no JSON from character {position} on: {_short(arguments)}")
        arguments = read.root.value
    if not isinstance(arguments, dict):
        raise InputError(f"arguments of {name!r} must be an object or its JSON text, got {_short(arguments)}")
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"arguments of {name!r} cannot be written as JSON: {error}") from None
    return Call(name, arguments)


def message_with_calls(calls: Iterable[Call], content: str = "") -> dict[str, Any]:
    """An assistant message that makes the calls: the OpenAI shape, but arguments are dicts, as chat templates want."""
    tool_calls = [{"type": "function", "function": call.to_dict()} for call in calls]
    message: dict[str, Any] = {"role": "assistant", "content": content}
    return {**message, "tool_calls": tool_calls} if tool_calls else message


def _integral(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _integral(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_integral(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
