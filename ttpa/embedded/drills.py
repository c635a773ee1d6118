"""Drills: made-up tools with made-up arguments, from which a small model learns to read schemas and to copy values."""

from __future__ import annotations

import json
import random
from typing import Any

from ttpa.data.dialogues import Dialogue
from ttpa.tools.call import Call, message_with_calls
from ttpa.tools.toolbox.names import CONSONANTS, VOWELS
from ttpa.tools.toolbox.schemas import Schema, array, choice, record

VERBS = "get set find list add move cancel send book search place order return check open start make update".split()
NOUNS = (
    "event item record page ticket user file note room order price account list message city trip plan date task "
    "group light product flight report"
).split()
FIELDS = (
    "name title text date time city count limit amount price room kind status color street query reason account "
    "recipient currency number level size mode state id note channel folder label phone unit"
).split()
WORDS = "please with for in at on from to and the my of by as it is".split()


def drill(rng: random.Random, number: int) -> Dialogue:
    """One dialogue of one or two calls, in which every value of a call stands in the question or in a tool result."""
    tools = [_tool(rng) for _ in range(rng.randint(2, 4))]
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        return drill(rng, number)
    first, second = rng.sample(tools, 2)
    call, said = _call(rng, first["function"])
    messages: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = [message_with_calls([call]), {"role": "tool", "content": _result(rng)}]
    question = said
    if rng.random() < 0.3:
        other, other_said = _call(rng, second["function"])
        name = next((key for key, value in other.arguments.items() if isinstance(value, str)), None)
        if name is not None:
            # The value moves from the question into the result of the first call: it must be copied from there.
            value = f"{rng.choice('abcemopr')}{rng.randint(100, 999)}"
            if rng.random() < 0.5:
                rows = [
                    {"id": f"{value[0]}{rng.randint(100, 999)}", "name": _word(rng)} for _ in range(rng.randint(0, 2))
                ]
                rows.insert(rng.randint(0, len(rows)), {"id": value, "name": _word(rng)})
                title = next(row["name"] for row in rows if row["id"] == value)
                turns[1]["content"] = json.dumps({f"{rng.choice(NOUNS)}s": rows})
                hint = f"{name} of {title}"
            else:
                turns[1]["content"] = json.dumps({name: value, rng.choice(FIELDS) + "s": rng.randint(1, 300)})
                hint = f"that {name}"
            other_said = other_said.replace(f"{name} {other.arguments[name]}", hint, 1)
            other.arguments[name] = value
        question = f"{said} {rng.choice(('Then', 'After that', 'And'))} {other_said}"
        turns += [message_with_calls([other]), {"role": "tool", "content": _result(rng)}]
    messages = [{"role": "user", "content": question}, *turns, {"role": "assistant", "content": "Done."}]
    return Dialogue(f"drill-{number}", tools, messages, {"split": "drills"})


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 3))) + rng.choice(
        ("", "n", "r", "s")
    )


def _words(rng: random.Random) -> str:
    words = [_word(rng) for _ in range(rng.randint(1, 3))]
    return " ".join(word.capitalize() for word in words) if rng.random() < 0.4 else " ".join(words)


def _schema(rng: random.Random, depth: int = 0) -> Schema:
    kind = rng.choices(
        ("text", "code", "integer", "number", "choice", "flag", "list", "record"),
        (5, 3, 3, 1, 3, 1, 1, 1 if depth == 0 else 0),
    )[0]
    if kind == "choice":
        return choice(*dict.fromkeys(_word(rng) for _ in range(rng.randint(2, 4))))
    if kind == "list":
        return array({"type": "string"})
    if kind == "record":
        parts = {name: _schema(rng, 1) for name in rng.sample(FIELDS, 2)}
        return {**record(), "properties": parts, "required": list(parts)}
    return {"type": {"text": "string", "code": "string", "flag": "boolean"}.get(kind, kind), "title": kind}


def _tool(rng: random.Random) -> dict[str, Any]:
    names = rng.sample(FIELDS, rng.randint(1, 4))
    required = [names[0], *(name for name in names[1:] if rng.random() >= 0.4)]
    properties = {name: _schema(rng) for name in names}
    parameters = {**record(), "properties": properties, "required": required}
    name = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


def _value(rng: random.Random, schema: Schema) -> tuple[Any, str]:
    if "enum" in schema:
        value = rng.choice(schema["enum"])
    elif schema["type"] == "array":
        values = [_words(rng) for _ in range(rng.randint(1, 3))]
        return values, values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"
    elif schema["type"] == "object":
        parts = {name: _value(rng, part) for name, part in schema["properties"].items()}
        return {name: value for name, (value, _) in parts.items()}, " ".join(
            f"{n} {said}" for n, (_, said) in parts.items()
        )
    elif schema["type"] == "integer":
        value = rng.choice((rng.randint(1, 9), rng.randint(10, 999)))
    elif schema["type"] == "number":
        value = rng.randint(1, 300) + 0.5
    elif schema["type"] == "boolean":
        value = rng.random() < 0.5
        return value, "yes" if value else "no"
    elif schema["title"] == "code":
        date = f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
        clock = f"{rng.randint(0, 23):02}:{rng.choice((0, 15, 30, 45)):02}"
        value = rng.choice(
            (date, clock, f"{rng.choice('abcemopr')}{rng.randint(100, 999)}", str(rng.randint(10**6, 10**7 - 1)))
        )
    else:
        value = _words(rng)
    return value, str(value)


def _call(rng: random.Random, function: dict[str, Any]) -> tuple[Call, str]:
    schema = function["parameters"]
    arguments: dict[str, Any] = {}
    said = []
    for name, part in schema["properties"].items():
        if name in schema["required"] or rng.random() < 0.5:
            arguments[name], text = _value(rng, part)
            said.append(f"{name} {text}")
    rng.shuffle(said)
    verb, noun = function["name"].split("_")
    lead = " ".join(
        filter(
            None, (rng.choice(WORDS) if rng.random() < 0.3 else "", verb, rng.choice(("a", "the", "this", "")), noun)
        )
    )
    glue = rng.choice((", ", " and ", " with ", "; "))
    return Call(
        function["name"], arguments
    ), f"{lead.capitalize()}{rng.choice((':', ' with', ' for', ','))} {glue.join(said)}."


def _result(rng: random.Random) -> str:
    value: Any = rng.choice((f"{rng.choice('abcemopr')}{rng.randint(100, 999)}", rng.randint(1, 300)))
    return json.dumps({rng.choice(FIELDS): value})
