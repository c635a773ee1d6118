"""TRL's preference rows: plain text and conversations, with tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ttpa.data.build import Example
from ttpa.data.formats.format import Place, RowFormat, check_columns
from ttpa.data.messages import (
    Message,
    check_call_names,
    checked_messages,
    functions_of,
    tool_names,
    with_dict_arguments,
    with_tool_calls,
    without_nulls,
)
from ttpa.data.report import DataReport
from ttpa.data.schemas import ARROW
from ttpa.errors import InputError

SIDES = ("prompt", "chosen", "rejected")
Side = str | list[Message]


@dataclass(frozen=True)
class Columns:
    """What TRL's preference rows, paired or not, hold: `sides` are the prompt and the completions that were given, all
    texts or all checked messages; `tools` is None where the row has none."""

    id: str
    where: str
    sides: dict[str, Any]
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any]


def read_row(row: dict[str, Any], place: Place, report: DataReport) -> Example | None:
    """The example of a TRL preference row: `chosen` and `rejected`, `prompt` unless both share it, all texts or all
    lists of messages, optionally `tools` (a list or its JSON text), `chat_template_kwargs` and `id`. Token ids are
    those of TRL 1.16. A row whose sides are equal is listed and dropped. Raises InputError for a bad row."""
    columns = read_columns(_without_repeated_prompt(row, place, report), SIDES, place, report)
    sides = columns.sides
    if json.dumps(sides["chosen"]) == json.dumps(sides["rejected"]):
        report.drop(columns.id, columns.where, "identical", "chosen and rejected are equal")
        return None
    if "prompt" not in sides:
        share = _shared_text if isinstance(sides["chosen"], str) else _shared_messages
        sides.update(zip(SIDES, share(sides["chosen"], sides["rejected"]), strict=True))
    check_chosen(sides["chosen"], columns.tools, "chosen")
    return Example(
        id=columns.id,
        where=columns.where,
        prompt=sides["prompt"],
        chosen=sides["chosen"],
        rejected=[sides["rejected"]],
        tools=columns.tools or [],
        template_kwargs=columns.template_kwargs,
        origin=place.origin("preference"),
    )


def read_columns(row: dict[str, Any], sides: Sequence[str], place: Place, report: DataReport) -> Columns:
    """The columns of a row that has the named `sides`, of which only a prompt may be missing; raises InputError for a
    missing or misspelt column, and for sides, tools and chat_template_kwargs that are no such thing."""
    _check_names(row, sides, report)
    id, arrow = place.id_of(row), place.arrow
    kwargs = _from_json_text(row.get("chat_template_kwargs"), dict, "chat_template_kwargs") or {}
    tools = _from_json_text(row.get("tools"), list, "tools")
    if arrow and (tools, kwargs) != (pruned := (without_nulls(tools), without_nulls(kwargs))):
        report.repair(id, str(place), ARROW)
        tools, kwargs = pruned
    tool_names(tools or [])
    parts = {name: row[name] for name in sides if row.get(name) is not None}
    kinds = {name: type(part).__name__ for name, part in parts.items()}
    if set(kinds.values()) == {"list"}:
        for name, part in parts.items():
            messages, legacy = with_tool_calls(part, name)
            messages = checked_messages(messages, name)
            messages = _without_injected_nulls(messages, tools, arrow, (id, str(place)), report)
            parts[name], repairs = with_dict_arguments(messages)
            for repair, detail in (*legacy, *((repair, f"{name}: {detail}") for repair, detail in repairs)):
                report.repair(id, str(place), repair, detail)
    elif set(kinds.values()) != {"str"}:
        found = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        hint = "; drop a prompt column whose text both sides repeat" if kinds.get("prompt") == "str" else ""
        raise InputError(f"{', '.join(sides)} must be all text or all lists of messages, found {found}{hint}")
    return Columns(id, str(place), parts, tools, kwargs)


def check_chosen(side: Side, tools: list[dict[str, Any]] | None, name: str) -> None:
    """Raise InputError for a side to prefer whose calls name no tool. Rows without a tools column may hold their tools
    in the system prompt: then nothing is known of them."""
    if tools is not None and not isinstance(side, str):
        check_call_names(side, tools, name)


def _check_names(row: dict[str, Any], sides: Sequence[str], report: DataReport) -> None:
    columns, required = ("id", *sides, "tools", "chat_template_kwargs"), [name for name in sides if name != "prompt"]
    accepted = f"accepted: {', '.join(columns)} (required: {', '.join(required)})"
    if any(row.get(name) is None for name in required):
        raise InputError(f"not a preference row; columns found: {', '.join(row) or 'none'}; {accepted}")
    check_columns(row, columns, report, accepted=accepted)


def _without_repeated_prompt(row: dict[str, Any], place: Place, report: DataReport) -> dict[str, Any]:
    """The row without a prompt in text beside sides that both begin with it as a message, a habit of published sets."""
    prompt, sides = row.get("prompt"), [row.get("chosen"), row.get("rejected")]
    first = [side[0] for side in sides if isinstance(side, list) and side]
    opens = [message.get("content") == prompt for message in first if isinstance(message, dict)]
    if not isinstance(prompt, str) or opens != [True, True]:
        return row
    id = place.id_of(row)
    report.repair(id, str(place), "prompt that both sides repeat left out")
    return {name: part for name, part in row.items() if name != "prompt"}


def _from_json_text(value: Any, kind: type, name: str) -> Any:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is text but no JSON: {error}") from None
    if value is not None and not isinstance(value, kind):
        raise InputError(f"{name} must be a {kind.__name__} or its JSON text, not {type(value).__name__}")
    return value


def _shared_text(chosen: str, rejected: str) -> tuple[str, ...]:
    """The beginning of both texts as prompt; a space before the difference goes to the completions, as in TRL."""
    at = _first_difference(chosen, rejected)
    if at > 0 and chosen[at - 1] == " ":
        at -= 1
    if at == 0:
        raise InputError("chosen and rejected share no beginning; give the prompt in a column of its own")
    return chosen[:at], chosen[at:], rejected[at:]


def _shared_messages(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], ...]:
    # As text: in Python True is 1 and 1 is 1.0, and the order of keys does not count.
    at = _first_difference(list(map(json.dumps, chosen)), list(map(json.dumps, rejected)))
    if at == 0:
        raise InputError("chosen and rejected share no first message; give the prompt in a column of its own")
    return chosen[:at], chosen[at:], rejected[at:]


def _first_difference(chosen: Sequence[str], rejected: Sequence[str]) -> int:
    """The first index at which two sequences differ, or the last one of the shorter: no side is left empty."""
    last = max(0, min(len(chosen), len(rejected)) - 1)
    return next((i for i in range(last) if chosen[i] != rejected[i]), last)


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
                kept = without_nulls(kept) if arrow else kept
                if kept != arguments:
                    report.repair(*place, "null arguments left out", function["name"])
                function = {**function, "arguments": kept}
            calls.append({**call, "function": function} if "function" in call else function)
        changed.append({**message, "tool_calls": calls} if calls else message)
    return changed


def _properties(tool: dict[str, Any]) -> dict[str, Any]:
    parameters = tool.get("function", tool).get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties if isinstance(properties, dict) else {}


PREFERENCE = RowFormat(
    "preference",
    "preferences",
    columns="prompt, chosen, rejected",
    matches=lambda row: "chosen" in row and "rejected" in row,
    read=read_row,
)
