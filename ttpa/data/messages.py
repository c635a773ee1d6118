"""Chat messages from outside: checked, and with call arguments as dicts, as chat templates want them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ttpa.errors import InputError
from ttpa.tools.call import call_from_message

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]


def checked_messages(value: Any, name: str) -> list[Message]:
    """The messages of column `name`, keys that are None left out and a missing content made empty; raises InputError
    unless it is a non-empty list of messages with a known role, text as content and calls that name a tool."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{name} must be a non-empty list of messages")
    messages = []
    for index, message in enumerate(value):
        where = f"{name} message {index}"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise InputError(f"{where}: the role must be one of {', '.join(ROLES)}, not {role!r}")
        if not isinstance(message.get("content"), str | None):
            raise InputError(f"{where}: the content must be text")
        calls = message.get("tool_calls")
        if calls is not None and (not isinstance(calls, list) or message["role"] != "assistant"):
            raise InputError(f"{where}: tool_calls must be a list, in a message of the assistant")
        for call in calls or []:
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
                raise InputError(f"{where}: a tool call has no name: {_short(call)}")
        present = {key: part for key, part in message.items() if part is not None and part != []}
        messages.append({"role": present.pop("role"), "content": present.pop("content", ""), **present})
    return messages


def with_tool_calls(value: Any, name: str) -> tuple[Any, list[tuple[str, str]]]:
    """The messages of column `name`, not checked yet, with the legacy `function_call` as tool_calls, the role function
    as tool, and a content of text parts as one text, its parts on lines of their own; and the (repair, detail) of each.
    Raises InputError for a part that is no text, and for calls in both forms."""
    changed, repairs = [], []
    for index, message in enumerate(value if isinstance(value, list) else []):
        where = f"{name} message {index}"
        if not isinstance(message, dict):
            return value, []  # for checked_messages to refuse
        message = dict(message)
        if message.get("role") == "function":
            message["role"] = "tool"
            repairs.append(("role function read as tool", where))
        call = message.pop("function_call", None)
        if call is not None:
            if message.get("tool_calls"):
                raise InputError(f"{where} has both function_call and tool_calls")
            message["tool_calls"] = [{"type": "function", "function": call}]
            repairs.append(("function_call read as tool_calls", where))
        if isinstance(message.get("content"), list):
            message["content"] = "\n".join(_text_of(part, where) for part in message["content"])
            repairs.append(("parts of a content joined", where))
        changed.append(message)
    return (changed if isinstance(value, list) else value), repairs


def functions_of(message: Message) -> list[dict[str, Any]]:
    """The `{"name", "arguments"}` records of the calls of a checked message."""
    return [call.get("function", call) for call in message.get("tool_calls") or []]


def calls_of(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """All calls of the assistant in checked messages, as `{"name", "arguments"}`."""
    return [
        {"name": function["name"], "arguments": function.get("arguments", {})}
        for message in messages
        for function in functions_of(message)
    ]


def with_dict_arguments(messages: Iterable[Message]) -> tuple[list[Message], list[tuple[str, str]]]:
    """Checked messages with the arguments of their calls as dicts, and the (repair, detail) of every call that needed
    more than reading JSON: no arguments become {}, text that is no JSON object stays the text it is. Raises InputError
    for arguments that are neither an object nor text."""
    changed, repairs = [], []
    for message in messages:
        calls = []
        for call, function in zip(message.get("tool_calls", []), functions_of(message), strict=True):
            arguments = function.get("arguments")
            if arguments is None or arguments == "":
                arguments = {}
                repairs.append(("missing arguments read as none", function["name"]))
            elif isinstance(arguments, str):
                try:
                    arguments = call_from_message(function).arguments
                except InputError as error:
                    repairs.append(("arguments are no JSON object, kept as text", str(error)))
            elif not isinstance(arguments, dict):
                raise InputError(f"arguments of {function['name']!r} must be an object or its JSON text")
            calls.append(_with_arguments(call, arguments))
        changed.append({**message, "tool_calls": calls} if calls else message)
    return changed, repairs


def without_null_arguments(messages: Iterable[Message]) -> tuple[list[Message], list[tuple[str, str]]]:
    """Checked messages without the nulls that Arrow puts into the arguments of calls, and the (repair, detail) of every
    call that had some."""
    changed, repairs = [], []
    for message in messages:
        calls = []
        for call, function in zip(message.get("tool_calls", []), functions_of(message), strict=True):
            arguments = without_nulls(function.get("arguments"))
            if arguments != function.get("arguments"):
                repairs.append(("null arguments left out", function["name"]))
            calls.append(_with_arguments(call, arguments))
        changed.append({**message, "tool_calls": calls} if calls else message)
    return changed, repairs


def without_nulls(value: Any) -> Any:
    """A JSON value in which no object, at any depth, has a key whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def with_text_arguments(messages: Iterable[Message]) -> list[Message]:
    """Messages with the arguments of their calls as JSON text, as the OpenAI format has them on disk."""
    changed = []
    for message in messages:
        calls = [
            _with_arguments(call, json.dumps(function["arguments"], ensure_ascii=False))
            for call, function in zip(message.get("tool_calls") or [], functions_of(message), strict=True)
        ]
        changed.append({**message, "tool_calls": calls} if calls else message)
    return changed


def tool_names(tools: Iterable[dict[str, Any]]) -> list[str]:
    """The names of a list of OpenAI tools or bare functions; raises InputError for one without a name. The schemas are
    not judged: data made for other trainers may hold types that are no JSON Schema."""
    names = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"tool {index} has no name: {_short(tool)}")
        names.append(function["name"])
    return names


def check_call_names(messages: Iterable[Message], tools: list[dict[str, Any]], name: str) -> None:
    """Raise InputError if a call in checked messages names none of the tools."""
    offered = tool_names(tools)
    for call in calls_of(messages):
        if call["name"] not in offered:
            listed = ", ".join(offered) or "none"
            raise InputError(f"{name} calls {call['name']!r}, which names no tool; the row offers {listed}")


def _text_of(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InputError(f"{where}: the content must be text; a part of it is {_short(part)}")
    return part["text"]


def _with_arguments(call: dict[str, Any], arguments: Any) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": {**call["function"], "arguments": arguments}}
    return {**call, "arguments": arguments}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
