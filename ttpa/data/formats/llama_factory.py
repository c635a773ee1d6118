"""LLaMA-Factory's preference rows, in its Alpaca and ShareGPT forms."""

from __future__ import annotations

from typing import Any

from ttpa.data.build import Example
from ttpa.data.formats.format import Place, RowFormat
from ttpa.data.formats.sides import AS_TEXT, example_of
from ttpa.data.formats.turns import ROLES, RowReader, Unfit
from ttpa.data.messages import Message, checked_messages, with_dict_arguments, with_tool_calls, without_null_arguments
from ttpa.data.report import DataReport
from ttpa.errors import InputError

SIDES = ("chosen", "rejected")
MEDIA = ("images", "videos", "audios")
COLUMNS = ("id", "instruction", "input", "history", "conversations", "messages", "system", "tools", "output", *SIDES)


def read_row(row: dict[str, Any], place: Place, report: DataReport) -> Example | None:
    """The example of a row in one of LLaMA-Factory's default columns. Alpaca: `instruction`, optionally `input`,
    `history` and `system`, and the texts `chosen` and `rejected`, or both as a list in `output`. ShareGPT:
    `conversations` (or `messages`) that end with the user or a tool, and the turns `chosen` and `rejected`; the value
    of a function_call is the JSON of calls. `tools` is JSON text. Listed and dropped are rows with equal sides, with
    tools or calls that cannot be read, and with a chosen call that names no tool; a rejected call that cannot be read
    stays text. Raises InputError for a row of another shape, and for one with pictures or sound."""
    reader = RowReader(place.id_of(row), place, report)
    _check_columns(row, report)
    try:
        tools = reader.tools(row.get("tools"))
        prompt = _question(row) if "instruction" in row else _conversation(row, reader)
        if row.get("system") and prompt[0]["role"] != "system":
            prompt.insert(0, {"role": "system", "content": _text(row["system"], "system")})
        if prompt[-1]["role"] not in ("user", "tool"):
            raise InputError(f"the prompt must end with a turn of the user or a tool, not of the {prompt[-1]['role']}")
        chosen, rejected = _answers(row) if "instruction" in row else [_side(row, name, reader) for name in SIDES]
        return example_of(reader, prompt, chosen, rejected, tools=tools, tools_known=bool(tools))
    except Unfit as unfit:
        reader.drop(unfit)
        return None


def _check_columns(row: dict[str, Any], report: DataReport) -> None:
    for name in row:
        if name in MEDIA and row[name]:
            raise InputError(f"the row has {name}, and only text can be read")
        if name not in COLUMNS and name not in MEDIA:
            report.note(f"column {name!r} is not used")


def _question(row: dict[str, Any]) -> list[Message]:
    """The prompt of an Alpaca row; instruction and input are joined by a line end."""
    prompt: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise InputError(f"history must be a list of questions and answers, not {history!r:.80}")
    for index, turns in enumerate(history):
        if not isinstance(turns, list) or len(turns) != 2:
            raise InputError(f"history {index} must be a question and its answer, not {turns!r:.80}")
        for role, turn in zip(("user", "assistant"), turns, strict=True):
            prompt.append({"role": role, "content": _text(turn, f"history {index}")})
    parts = [_text(row[name], name) for name in ("instruction", "input") if row.get(name)]
    if not parts:
        raise InputError("instruction and input are empty")
    return [*prompt, {"role": "user", "content": "\n".join(parts)}]


def _answers(row: dict[str, Any]) -> list[Message]:
    """Both sides of an Alpaca row."""
    texts: Any = [row.get(name) for name in SIDES]
    if texts == [None, None]:
        texts = row.get("output")
        if not isinstance(texts, list) or len(texts) != 2:
            raise InputError(f"a row without chosen and rejected needs both texts in output, not {texts!r:.80}")
    return [{"role": "assistant", "content": _text(text, name)} for text, name in zip(texts, SIDES, strict=True)]


def _conversation(row: dict[str, Any], reader: RowReader) -> list[Message]:
    name = "messages" if row.get("conversations") is None else "conversations"
    turns = row.get(name)
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{name} must be a non-empty list of turns")
    return [_message(turn, f"{name} {index}", reader) for index, turn in enumerate(turns)]


def _side(row: dict[str, Any], name: str, reader: RowReader) -> Message:
    try:
        message = _message(row.get(name), name, reader)
    except Unfit as unfit:
        if name == "chosen":
            raise
        reader.repairs.append((AS_TEXT, unfit.args[1]))
        message = {"role": "assistant", "content": row[name].get("value", row[name].get("content"))}
    if message["role"] != "assistant":
        raise InputError(f"{name} must be a turn of the model, not of the {message['role']}")
    return message


def _message(turn: Any, where: str, reader: RowReader) -> Message:
    """The message of a turn, under the names of ShareGPT or of OpenAI; raises Unfit for a call that cannot be read."""
    if not isinstance(turn, dict):
        raise InputError(f"{where} must be an object with from and value, not {turn!r:.80}")
    role = ROLES.get(str(turn.get("from", turn.get("role"))))
    if role is None:
        raise InputError(f"{where}: the role must be one of {', '.join(ROLES)}: {turn!r:.80}")
    if role == "function_call":
        return reader.call_text(_text(turn.get("value", turn.get("content")), where))
    if "from" in turn:
        return {"role": role, "content": _text(turn.get("value"), where)}
    messages, repairs = with_tool_calls([{**turn, "role": role}], where)
    messages = checked_messages(messages, where)
    if reader.place.arrow:
        messages, nulls = without_null_arguments(messages)
        reader.repairs.extend(nulls)
    (message,), found = with_dict_arguments(messages)
    reader.repairs.extend([*repairs, *found])
    return message


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} must be text, not {value!r:.80}")
    return value


def _matches(row: dict[str, Any]) -> bool:
    if "instruction" in row:
        return ("chosen" in row and "rejected" in row) or isinstance(row.get("output"), list)
    return ("conversations" in row or "messages" in row) and isinstance(row.get("chosen"), dict)


LLAMA_FACTORY = RowFormat(
    "llama_factory",
    "preferences",
    columns="instruction or conversations, chosen, rejected",
    matches=_matches,
    read=read_row,
)
