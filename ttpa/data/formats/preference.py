"""TRL's preference rows: plain text and conversations, with tools."""

from __future__ import annotations

import json
from typing import Any

from ttpa.config import nearest
from ttpa.data.build import Example
from ttpa.data.formats.format import Place, RowFormat
from ttpa.data.messages import (
    Message,
    check_call_names,
    checked_messages,
    functions_of,
    tool_names,
    with_dict_arguments,
)
from ttpa.data.report import DataReport
from ttpa.errors import InputError

COLUMNS = ("id", "prompt", "chosen", "rejected", "tools", "chat_template_kwargs")


def read_row(row: dict[str, Any], place: Place, report: DataReport) -> Example:
    """The example of a TRL preference row: `chosen` and `rejected`, `prompt` unless both share it, all texts or all
    lists of messages, optionally `tools` (a list or its JSON text), `chat_template_kwargs` and `id`. Token ids are
    those of TRL 1.16. Raises InputError for a bad row."""
    _check_columns(row, report)
    id = place.id if row.get("id") is None else str(row["id"])
    where, arrow = str(place), place.path.suffix == ".parquet"
    sides = [name for name in ("prompt", "chosen", "rejected") if row.get(name) is not None]
    kinds = {name: type(row[name]).__name__ for name in sides}
    kwargs = _from_json_text(row.get("chat_template_kwargs"), dict, "chat_template_kwargs") or {}
    tools = _from_json_text(row.get("tools"), list, "tools")
    if arrow:
        tools, kwargs = _without_nulls(tools), _without_nulls(kwargs)
    tool_names(tools or [])
    if set(kinds.values()) == {"str"}:
        texts = (row["prompt"], row["chosen"], row["rejected"]) if "prompt" in sides else _shared_text(row)
        prompt, chosen, rejected = texts
    elif set(kinds.values()) == {"list"}:
        parts = {name: checked_messages(row[name], name) for name in sides}
        for name, messages in parts.items():
            messages = _without_injected_nulls(messages, tools, arrow, (id, where), report)
            parts[name], repairs = with_dict_arguments(messages)
            for repair, detail in repairs:
                report.repair(id, where, repair, f"{name}: {detail}")
        if "prompt" not in parts:
            parts.update(zip(("prompt", "chosen", "rejected"), _shared_messages(**parts), strict=True))
        # Rows without a tools column may hold their tools in the system prompt: then nothing is known of them.
        if tools is not None:
            check_call_names(parts["chosen"], tools, "chosen")
        prompt, chosen, rejected = parts["prompt"], parts["chosen"], parts["rejected"]
    else:
        raise InputError(
            "prompt, chosen and rejected must be all text or all lists of messages, found "
            + ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
            + ("; drop a prompt column whose text both sides repeat" if kinds.get("prompt") == "str" else "")
        )
    origin = {"format": "preference", "file": place.path.name, "line": place.line}
    return Example(id, where, prompt, chosen, [rejected], tools or [], kwargs, origin)


def _check_columns(row: dict[str, Any], report: DataReport) -> None:
    accepted = f"accepted: {', '.join(COLUMNS)} (chosen and rejected are required)"
    if row.get("chosen") is None or row.get("rejected") is None:
        raise InputError(f"not a preference row; columns found: {', '.join(row) or 'none'}; {accepted}")
    for name in row:
        if name not in COLUMNS:
            close = nearest(name, COLUMNS, cutoff=0.85)
            if close and close not in row:
                raise InputError(f"unknown column {name!r}: did you mean {close!r}? {accepted}")
            report.note(f"column {name!r} is not used")


def _from_json_text(value: Any, kind: type, name: str) -> Any:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is text but no JSON: {error}") from None
    if value is not None and not isinstance(value, kind):
        raise InputError(f"{name} must be a {kind.__name__} or its JSON text, not {type(value).__name__}")
    return value


def _shared_text(row: dict[str, Any]) -> tuple[str, str, str]:
    """The beginning of both texts as prompt; a space before the difference goes to the completions, as in TRL."""
    chosen, rejected = row["chosen"], row["rejected"]
    at = _first_difference(chosen, rejected)
    if at > 0 and chosen[at - 1] == " ":
        at -= 1
    return chosen[:at], chosen[at:], rejected[at:]


def _shared_messages(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
    at = _first_difference(chosen, rejected)
    if at == 0:
        raise InputError("chosen and rejected share no first message; give the prompt in a column of its own")
    return chosen[:at], chosen[at:], rejected[at:]


def _first_difference(chosen: Any, rejected: Any) -> int:
    """The first index at which two sequences differ, or the last one of the shorter: no side is left empty."""
    last = max(0, min(len(chosen), len(rejected)) - 1)
    return next((i for i in range(last) if chosen[i] != rejected[i]), last)


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object of a column the keys of all others, with null as value."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _without_injected_nulls(
    messages: list[Message], tools: list[dict[str, Any]] | None, arrow: bool, place: tuple[str, str], report: DataReport
) -> list[Message]:
    """Messages without the null arguments that Arrow made: in Parquet every null, in JSON (written from Arrow, perhaps)
    one whose name the tool does not have. What is taken out is listed in the report."""
    declared = {name: _properties(tool) for name, tool in zip(tool_names(tools or []), tools or [], strict=True)}
    changed = []
    for message in messages:
        calls = []
        for call, function in zip(message.get("tool_calls", []), functions_of(message), strict=True):
            arguments = function.get("arguments")
            if isinstance(arguments, dict):
                known = declared.get(function["name"], arguments)
                kept = {
                    key: part for key, part in arguments.items() if part is not None or (key in known and not arrow)
                }
                kept = _without_nulls(kept) if arrow else kept
                if kept != arguments:
                    report.repair(*place, "null arguments left out", function["name"])
                function = {**function, "arguments": kept}
            calls.append({**call, "function": function} if "function" in call else function)
        changed.append({**message, "tool_calls": calls} if calls else message)
    return changed


def _properties(tool: dict[str, Any]) -> dict[str, Any]:
    return ((tool.get("function", tool).get("parameters") or {}).get("properties")) or {}


PREFERENCE = RowFormat(
    "preference",
    "preferences",
    columns="prompt, chosen, rejected",
    matches=lambda row: "chosen" in row and "rejected" in row,
    read=read_row,
)
