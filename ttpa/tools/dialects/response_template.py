"""Tool calls of any other model, read by transformers' response templates, which keep no positions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ttpa.errors import InputError
from ttpa.tools.call import Call, call_from_message
from ttpa.tools.dialects.dialect import Dialect
from ttpa.tools.turn import FormatError, ParsedCall, ParsedTurn

NAME = "response_template"


def response_template_dialect(tokenizer: Any) -> Dialect | None:
    """The dialect that the tokenizer's `response_template` describes, or the one that TRL, where it is installed, has
    for its chat template; None if there is neither. Each call is known to lie somewhere in the turn, no more."""
    template = getattr(tokenizer, "response_template", None) or _of_trl(tokenizer)
    if template is None:
        return None

    def parse(text: str, tools: Sequence[dict[str, Any]] = ()) -> ParsedTurn:
        return _parse(template, text, tools)

    return Dialect(NAME, parse)


def _of_trl(tokenizer: Any) -> Any:
    """What TRL has for the text of the chat template, or of the one that it was changed from for training."""
    try:
        import trl
        from trl.chat_template_utils import add_response_schema
    except ImportError:
        return None
    text = tokenizer.get_chat_template(tools=[])
    for path in (Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja"):
        if path.read_text(encoding="utf-8") == text:
            text = path.with_name(path.name.replace("_training", "")).read_text(encoding="utf-8")
    # TRL writes into what it is given, and the tokenizer may be saved again.
    known: Any = SimpleNamespace(chat_template=text, response_template=None)
    try:
        add_response_schema(known)
    except ValueError:
        return None
    return known.response_template


def _parse(template: Any, text: str, tools: Sequence[dict[str, Any]]) -> ParsedTurn:
    from transformers.utils.chat_parsing import parse_response

    turn = ParsedTurn(text, [], [], text.strip())
    whole = (0, len(text))
    try:
        message = parse_response(text, template, prefix="", tools=list(tools))
        calls = [_call(record) for record in message.get("tool_calls") or []]
    except Exception as error:  # the parser is a foreign program and may fail in any way
        turn.calls.append(ParsedCall(0, None, None, span=whole, complete=False))
        turn.errors.append(FormatError("format.unparseable", 0, whole, f"{type(error).__name__}: {error}"))
        return turn
    turn.calls = [ParsedCall(i, call.name, call.arguments, span=whole) for i, call in enumerate(calls)]
    content = message.get("content")
    turn.content = content.strip() if isinstance(content, str) else ""
    return turn


def _call(record: dict[str, Any]) -> Call:
    """The call of a record; raises InputError for what no JSON text of reasonable depth can be."""
    function = record.get("function", record)
    if not isinstance(function.get("arguments"), dict):
        raise InputError("the arguments of a call are no object")
    return call_from_message({"name": function.get("name"), "arguments": json.dumps(function["arguments"])})
