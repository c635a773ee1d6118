"""Chats in the OpenAI format, our own dialogues among them."""

from __future__ import annotations

from typing import Any

from ttpa.data.dialogues import Dialogue
from ttpa.data.formats.format import Place, RowFormat
from ttpa.data.report import DataReport


def read_row(row: dict[str, Any], place: Place, report: DataReport) -> Dialogue:
    """The dialogue of a row; raises InputError as `Dialogue.from_dict` does."""
    return Dialogue.from_dict(row)


CHAT = RowFormat("chat", "dialogues", columns="tools, messages", matches=lambda row: "messages" in row, read=read_row)
