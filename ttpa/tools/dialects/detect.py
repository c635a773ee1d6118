"""How a tokenizer's chat template writes tool calls, found out by letting it write some."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ttpa.errors import InputError
from ttpa.tools.dialects import DIALECTS, dialect_named
from ttpa.tools.dialects.dialect import Dialect
from ttpa.tools.dialects.hermes import HERMES
from ttpa.tools.dialects.response_template import response_template_dialect
from ttpa.tools.prefix import shared_length

USER = {"role": "user", "content": "Probe?"}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {
                "probe_key": {"type": "string", "description": "Text."},
                "number": {"type": "integer", "description": "A number."},
                "inner": {"type": "object", "description": "An object."},
            },
            "required": ["probe_key"],
        },
    },
}
ONE, TWO = {"probe_key": "first value"}, {"probe_key": "second value"}
# What every template that writes calls at all can write: a lone quote or a backslash is too much for some.
HARD = {"probe_key": 'Łódź, "a" {b}', "number": 7, "inner": {"list": [1.5, True, "c d"]}}
_CUT_TAG = re.compile(r"<[^<>\s]*\Z")


@dataclass(frozen=True)
class CallStyle:
    """How a chat template writes calls. `dialect` is the one that reads them back exactly, None if there is none.
    `objects` and `texts` say whether arguments are written when they come as an object and, unchanged, when they come
    as JSON text (neither: the template drops calls), `several` whether a turn can have more than one call,
    `beside_text` whether the text of a turn that also makes calls is written, and `ids` whether the template fails on a
    call without an id of nine characters, as Mistral's do. A template that fails on every call has the defaults: it
    fails on calls in the data too, and says why."""

    dialect: Dialect | None = None
    objects: bool = True
    texts: bool = False
    several: bool = True
    beside_text: bool = True
    ids: bool = False


_STYLES: dict[tuple[Any, ...], CallStyle] = {}


def dialect_of(tokenizer: Any) -> Dialect:
    """The dialect in which the turns of a model are read: the one that `tokenizer.tool_dialect` names, else the one
    that reads back exactly what the chat template writes of a probe call, else the tokenizer's response template (or
    the one that TRL, where installed, has for the chat template), read by transformers without positions. A tokenizer
    without chat template is for plain text and has Hermes. Raises InputError where calls cannot be read."""
    dialect = find_dialect(tokenizer)
    if dialect is None:
        style = call_style(tokenizer)
        does = "writes tool calls in no known way" if style.objects or style.texts else "drops tool calls"
        raise InputError(
            f"the chat template of the tokenizer {does}, so they cannot be read from the model's turns: use a model "
            f"made for tool calls, or name the way in which it writes them with --dialect ({', '.join(DIALECTS)})"
        )
    return dialect


def find_dialect(tokenizer: Any) -> Dialect | None:
    """As `dialect_of`, but None where calls cannot be read; raises InputError only for an unknown `tool_dialect` and
    as `call_style` does."""
    named = getattr(tokenizer, "tool_dialect", None)
    if named is not None:
        return dialect_named(named)
    return call_style(tokenizer).dialect if getattr(tokenizer, "chat_template", None) else HERMES


def use_dialect(tokenizer: Any, name: str | None) -> None:
    """Have the turns of a model read in the dialect of that name, None for the one that its chat template writes.
    Raises InputError for a name that is none, and where the template writes another dialect: right answers would then
    be rendered in one way and read in the other."""
    written = None if name is None or not tokenizer.chat_template else call_style(tokenizer).dialect
    if name is not None and written not in (None, dialect_named(name)) and written.name in DIALECTS:
        raise InputError(
            f"--dialect {name}: the chat template of the tokenizer writes tool calls as {written.name} does; leave "
            "--dialect out, or give the tokenizer the template that the model was trained with"
        )
    tokenizer.tool_dialect = name


def call_style(tokenizer: Any) -> CallStyle:
    """How the tokenizer's chat template writes calls; worked out once for each template. Raises InputError for a
    tokenizer of several templates of which none is for tools or the default."""
    try:
        template = tokenizer.get_chat_template(tools=[TOOL])
    except ValueError as error:
        raise InputError(f"the tokenizer has no chat template for tools: {error}") from None
    # an unset end-of-text token makes some templates fail
    key = (template, tokenizer.bos_token, tokenizer.eos_token, repr(getattr(tokenizer, "response_template", None)))
    if key not in _STYLES:
        _STYLES[key] = _probe(tokenizer)
    return _STYLES[key]


def _probe(tokenizer: Any) -> CallStyle:
    with_object, with_text = _turn(tokenizer, [ONE]), _turn(tokenizer, [json.dumps(ONE)])
    if with_object is None and with_text is None:
        return CallStyle()
    objects = all(word in (with_object or "") for word in ("probe_tool", "probe_key", "first value"))
    texts = json.dumps(ONE) in (with_text or "")
    dialect = _reader(tokenizer, _turn(tokenizer, [HARD])) if objects else None
    if dialect is None and texts:
        # A template that writes what it is given would write an object in Python's words.
        dialect = _reader(tokenizer, _turn(tokenizer, [json.dumps(HARD)]))
        objects = objects and dialect is None

    def written(calls: Sequence[dict[str, Any]], content: str = "") -> str:
        return _turn(tokenizer, calls if objects else [json.dumps(arguments) for arguments in calls], content) or ""

    two, beside = written([ONE, TWO]), written([ONE], "Probe said.")
    return CallStyle(
        dialect=dialect,
        objects=objects,
        texts=with_text == with_object if objects else texts,
        several="first value" in two and "second value" in two,
        beside_text="Probe said." in beside and "first value" in beside,
        ids=_turn(tokenizer, [ONE if objects else json.dumps(ONE)], ids=False) is None,
    )


def _reader(tokenizer: Any, hard: str | None) -> Dialect | None:
    """The dialect that reads the hard call and nothing else from a turn that the template wrote."""
    if hard is None:
        return None

    def reads(dialect: Dialect) -> bool:
        turn = dialect.parse(hard, [TOOL])  # what ends the turn is text to a dialect
        return not turn.errors and [(call.name, call.arguments) for call in turn.calls] == [("probe_tool", HARD)]

    for dialect in DIALECTS.values():
        if reads(dialect):
            return dialect
    generic = response_template_dialect(tokenizer)
    return generic if generic is not None and reads(generic) else None


def _turn(
    tokenizer: Any, arguments: Sequence[dict[str, Any] | str], content: str = "", *, ids: bool = True
) -> str | None:
    """What the template writes of a turn after the prompt; None if it fails."""
    calls: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": "probe_tool", "arguments": one}} for one in arguments
    ]
    for number, call in enumerate(calls if ids else ()):
        call["id"] = f"probe000{number}"
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    try:
        prompt = tokenizer.apply_chat_template([USER], tools=[TOOL], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([USER, message], tools=[TOOL], tokenize=False)
    except Exception:  # a template is a foreign program and may fail in any way
        return None
    shared = shared_length(prompt, whole)
    # the prompt may open a thought where the turn opens a call, and both tags begin alike
    tag = _CUT_TAG.search(whole, 0, shared)
    return whole[tag.start() if tag else shared :]
