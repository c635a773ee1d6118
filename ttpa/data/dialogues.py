"""Dialogues: tools and messages in the OpenAI chat format, as `construct` makes them and `sample` reads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttpa.data.jsonl import write_json_lines
from ttpa.data.messages import with_text_arguments


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


def write_dialogues(path: Path | str, dialogues: Iterable[Dialogue]) -> None:
    """Write dialogues as JSON Lines, under a temporary name that is renamed to `path` at the end."""
    write_json_lines(path, (dialogue.to_dict() for dialogue in dialogues))
