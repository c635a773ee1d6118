"""When2Call (arXiv 2504.18851): its preference rows, and its test rows, on which nothing is trained."""

from __future__ import annotations

from typing import Any

from ttpa.data.build import Example
from ttpa.data.dialogues import Dialogue
from ttpa.data.formats.format import Place, RowFormat
from ttpa.data.formats.sides import AS_TEXT, example_of
from ttpa.data.formats.turns import RowReader, Unfit
from ttpa.data.messages import Message, checked_messages
from ttpa.data.report import DataReport
from ttpa.errors import InputError

OPEN, CLOSE = "<TOOLCALL>", "</TOOLCALL>"
COLUMNS = ("tools", "messages", "chosen_response", "rejected_response")
TEST_COLUMNS = ("uuid", "question", "tools", "correct_answer", "answers")


def read_row(row: dict[str, Any], place: Place, report: DataReport) -> Example | None:
    """The example of a preference row: `tools` (objects or their JSON texts, types as Python words, `required` beside
    the parameters), `messages`, `chosen_response` and `rejected_response`, in which `<TOOLCALL>[..]</TOOLCALL>` is read
    as calls. Listed and dropped are rows with equal sides, with tools or a chosen call that cannot be read, and with a
    chosen call that names no tool; a rejected call that cannot be read stays text. Raises InputError for a row of
    another shape."""
    reader = RowReader(place.id, place, report)
    reader.note_unused(row, COLUMNS)
    prompt = checked_messages(row.get("messages"), "messages")
    sides = {name: _checked_response(row.get(name), name) for name in COLUMNS[2:]}
    try:
        tools = reader.tools(_as_list(row.get("tools")))
        chosen = _with_calls(sides["chosen_response"], reader)
        rejected = sides["rejected_response"]
        try:
            rejected = _with_calls(rejected, reader)
        except Unfit as unfit:
            reader.repairs.append((AS_TEXT, unfit.args[1]))
        return example_of(reader, prompt, chosen, rejected, tools=tools)
    except Unfit as unfit:
        reader.drop(unfit)
        return None


def read_test_row(row: dict[str, Any], place: Place, report: DataReport) -> Dialogue | None:
    """The question of a test row as a dialogue without an answer; one with tools that cannot be read is listed and
    dropped. Raises InputError for a row of another shape."""
    missing = [name for name in TEST_COLUMNS if name not in row]
    if missing or not isinstance(row["question"], str):
        raise InputError(f"a test row of When2Call has {', '.join(TEST_COLUMNS)}, and its question is text")
    reader = RowReader(str(row["uuid"]), place, report)
    try:
        tools = reader.tools(_as_list(row["tools"]))
    except Unfit as unfit:
        reader.drop(unfit)
        return None
    for repair, detail in reader.repairs:
        report.repair(reader.id, str(place), repair, detail)
    source = {"format": "when2call", "correct_answer": row["correct_answer"]}
    return Dialogue(reader.id, tools, [{"role": "user", "content": row["question"]}], source)


def _as_list(tools: Any) -> Any:
    """Tools of which each is a JSON text, as the JSON text of their list."""
    if isinstance(tools, list) and all(isinstance(tool, str) for tool in tools):
        return f"[{', '.join(tools)}]"
    return tools


def _checked_response(value: Any, name: str) -> Message:
    (message,) = checked_messages([value], name)
    if message["role"] != "assistant":
        raise InputError(f"{name} must be a message of the assistant, not of the {message['role']}")
    return message


def _with_calls(message: Message, reader: RowReader) -> Message:
    """The message with the calls in its text as calls; raises Unfit where they cannot be read."""
    before, opened, rest = message["content"].partition(OPEN)
    if not opened:
        return message
    body, closed, after = rest.rpartition(CLOSE)
    if not closed or after.strip():
        raise Unfit("a call cannot be read", f"{CLOSE} does not end the response")
    return {**reader.call_text(body), "content": before.strip()}


WHEN2CALL = RowFormat(
    "when2call",
    "preferences",
    columns=", ".join(COLUMNS),
    matches=lambda row: "chosen_response" in row and "rejected_response" in row,
    read=read_row,
)
WHEN2CALL_TEST = RowFormat(
    "when2call test",
    "evaluation",
    columns=", ".join(TEST_COLUMNS),
    matches=lambda row: "correct_answer" in row and "answers" in row,
    read=read_test_row,
)
