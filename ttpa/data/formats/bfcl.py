"""BFCL's single-turn questions: evaluation only."""

from __future__ import annotations

from typing import Any

from ttpa.data.dialogues import Dialogue
from ttpa.data.formats.format import Place, RowFormat
from ttpa.data.messages import checked_messages
from ttpa.data.report import DataReport
from ttpa.data.schemas import read_tools
from ttpa.errors import InputError

MULTI_TURN = ("involved_classes", "initial_config")


def read_row(row: dict[str, Any], place: Place, report: DataReport) -> Dialogue:
    """The question of a BFCL row as a dialogue without an answer, its functions as OpenAI tools with real JSON Schema;
    `source` has the category, and BFCL's own functions, which its checker reads. Raises InputError for questions of
    several turns, for possible answers, and for rows of another kind."""
    if "ground_truth" in row:
        raise InputError("these are possible answers: give the folder above, or the file of questions of the same name")
    question = row.get("question")
    if any(name in row for name in MULTI_TURN) or (isinstance(question, list) and len(question) > 1):
        raise InputError("questions of several turns need BFCL's own tools; only single-turn questions are read")
    if not isinstance(row.get("id"), str) or not isinstance(row.get("function"), list):
        raise InputError(f"a BFCL question has id, question and function, found {', '.join(row)}")
    if not isinstance(question, list) or not question:
        raise InputError(f"the question must be a list of one turn, not {question!r:.80}")
    tools, repairs = read_tools(row["function"], arrow=place.arrow)
    for repair, detail in repairs:
        report.repair(row["id"], str(place), repair, detail)
    source = {"format": "bfcl", "category": category_of(row["id"]), "functions": row["function"]}
    return Dialogue(row["id"], tools, checked_messages(question[0], "question"), source)


def category_of(id: str) -> str:
    """The category of a question, which its id begins with: simple_python_12, live_multiple_862-181-3."""
    return id.rpartition("_")[0]


def _matches(row: dict[str, Any]) -> bool:
    if row.keys() == {"id", "ground_truth"}:
        return True
    return isinstance(row.get("question"), list) and ("function" in row or MULTI_TURN[0] in row)


BFCL = RowFormat("bfcl", "evaluation", columns="id, question, function", matches=_matches, read=read_row)
