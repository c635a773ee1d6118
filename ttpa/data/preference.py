"""Preference files in TRL's formats: plain text and conversations, with tools, as JSON Lines, JSON or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ttpa.config import nearest
from ttpa.data.build import Example, Limits, build_tree
from ttpa.data.jsonl import read_json_lines, read_json_values
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
from ttpa.trees.record import PreferenceTree

COLUMNS = ("id", "prompt", "chosen", "rejected", "tools", "chat_template_kwargs")


def iterate_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line (in Parquet the row), from 1, and the record of every row of a .parquet file, of a .json file (one
    array, or object after object), or of JSON Lines; raises InputError for a missing or broken file."""
    readers = {".parquet": _parquet_rows, ".json": read_json_values}
    yield from readers.get(path.suffix, read_json_lines)(path)


def read_preferences(path: Path, *, tokenizer: Any, limits: Limits) -> tuple[list[PreferenceTree], DataReport]:
    """Trees of two leaves from a file of TRL preference rows: `chosen` and `rejected`, `prompt` unless both share it,
    all texts or all lists of messages, optionally `tools` (a list or its JSON text), `chat_template_kwargs` and `id`.
    Token ids are those of TRL 1.16. Raises InputError (file:line) for a bad row; what was dropped stands in the report.
    """
    report = DataReport(path=str(path), format="preference")
    trees = []
    for line, row in iterate_rows(path):
        report.read += 1
        try:
            example = _example(row, path, line, report)
            tree = build_tree(example, tokenizer=tokenizer, limits=limits, report=report)
        except InputError as error:
            raise InputError(str(error), path=path, line=line) from None
        if tree is not None:
            trees.append(tree)
    report.kept = len(trees)
    return trees, report


def _example(row: dict[str, Any], path: Path, line: int, report: DataReport) -> Example:
    _check_columns(row, report)
    id = f"{path.stem}:{line}" if row.get("id") is None else str(row["id"])
    where = f"{path}:{line}"
    sides = [name for name in ("prompt", "chosen", "rejected") if row.get(name) is not None]
    kinds = {name: type(row[name]).__name__ for name in sides}
    kwargs = _from_json_text(row.get("chat_template_kwargs"), dict, "chat_template_kwargs") or {}
    tools = _from_json_text(row.get("tools"), list, "tools")
    if path.suffix == ".parquet":
        tools, kwargs = _without_nulls(tools), _without_nulls(kwargs)
    tool_names(tools or [])
    if set(kinds.values()) == {"str"}:
        texts = (row["prompt"], row["chosen"], row["rejected"]) if "prompt" in sides else _shared_text(row)
        prompt, chosen, rejected = texts
    elif set(kinds.values()) == {"list"}:
        parts = {name: checked_messages(row[name], name) for name in sides}
        for name, messages in parts.items():
            messages = _without_injected_nulls(messages, tools, path.suffix == ".parquet", (id, where), report)
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
    origin = {"format": "preference", "file": path.name, "line": line}
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


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from datasets import load_dataset  # takes seconds to import, and only Parquet needs it

    if not path.is_file():
        raise InputError("no such file", path=path)
    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from enumerate(map(dict, rows), start=1)
    except Exception as error:  # pyarrow and datasets raise what they like for a broken file
        raise InputError(f"no readable Parquet file: {error}", path=path) from None
