"""Dialogues: tools and messages in the OpenAI chat format, as `construct` makes them and `sample` reads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttpa.data.jsonl import write_json_lines
from ttpa.data.messages import check_call_names, checked_messages, with_dict_arguments, with_text_arguments
from ttpa.errors import InputError
from ttpa.tools.schema import functions


@dataclass
class Dialogue:
    """One dialogue: `tools` are OpenAI function schemas, `messages` are OpenAI chat messages whose call arguments are
    dicts (JSON text on disk), `source` says how the dialogue came about."""

    id: str
    tools: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    source: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The record as it stands on disk: one JSON object, with call arguments as JSON text."""
        messages = with_text_arguments(self.messages)
        return {"id": self.id, "tools": self.tools, "messages": messages, "source": self.source}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Dialogue:
        """The inverse of `to_dict`; raises InputError for a missing or unknown field, tools that are no function
        schemas, malformed messages, a call that names no tool, and call arguments that are no JSON object."""
        fields: dict[str, type] = {"id": str, "tools": list, "messages": list, "source": dict}
        for name in [*record, *fields]:
            if name not in fields:
                raise InputError(f"unknown field {name!r}; a dialogue has {', '.join(fields)}")
            if name not in record and name != "source":
                raise InputError(f"field {name!r} is missing; a dialogue has {', '.join(fields)}")
            if name in record and not isinstance(record[name], fields[name]):
                raise InputError(f"field {name!r} must be a {fields[name].__name__}, not {record[name]!r:.80}")
        functions(record["tools"])
        messages, repairs = with_dict_arguments(checked_messages(record["messages"], "messages"))
        if repairs:
            raise InputError(": ".join(repairs[0]))
        check_call_names(messages, record["tools"], "the dialogue")
        return cls(record["id"], record["tools"], messages, record.get("source", {}))


def write_dialogues(path: Path | str, dialogues: Iterable[Dialogue]) -> None:
    """Write dialogues as JSON Lines, under a temporary name that is renamed to `path` at the end."""
    write_json_lines(path, (dialogue.to_dict() for dialogue in dialogues))
