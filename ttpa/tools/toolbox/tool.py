"""What a built-in tool is, and the few helpers that the domains share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

State = dict[str, Any]


class ToolError(Exception):
    """A tool refuses: `code` is a word that programs read (`not_found`, `conflict`, ...), the message is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Tool:
    """A tool: its schema, and the function that runs it on the state with arguments that the schema admits."""

    name: str
    description: str
    parameters: dict[str, Any]
    run: Callable[[State, dict[str, Any]], Any]

    @property
    def schema(self) -> dict[str, Any]:
        """The OpenAI function schema."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


def find(rows: dict[str, Any], key: str, what: str) -> Any:
    """The row of that key, or the typed error `not_found`."""
    if key not in rows:
        raise ToolError("not_found", f"no {what} {key!r}")
    return rows[key]


def new_id(rows: dict[str, Any], letter: str) -> str:
    """The next free id of a table whose ids are a letter and a number."""
    return f"{letter}{1 + max((int(key[1:]) for key in rows), default=100)}"
