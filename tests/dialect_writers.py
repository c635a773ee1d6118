"""Calls as each dialect writes them, and back from the text of one value; what mutations of such text are made of."""

from __future__ import annotations

import ast
import json

from ttpa.tools.dialects import DIALECTS


def hermes(calls):
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


def llama3_json(calls):
    return "; ".join(json.dumps({"name": call["name"], "parameters": call["arguments"]}) for call in calls)


def mistral(calls):
    return f"[TOOL_CALLS] {json.dumps(calls)}" if calls else ""


def pythonic(calls):
    def written(call):
        return f"{call['name']}({', '.join(f'{key}={value!r}' for key, value in call['arguments'].items())})"

    return f"[{', '.join(map(written, calls))}]" if calls else ""


def qwen3_coder(calls):
    def element(key, value):
        return f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"

    return "\n".join(
        f"<tool_call>\n<function={call['name']}>\n"
        f"{''.join(element(*item) for item in call['arguments'].items())}</function>\n</tool_call>"
        for call in calls
    )


WRITERS = {writer.__name__: writer for writer in (hermes, llama3_json, mistral, pythonic, qwen3_coder)}


def value_of(dialect, text, *, top, string):
    """What the text of a value says; `top` is one that is not inside another value, `string` a string."""
    if dialect == "qwen3_coder" and top and string:
        return text
    return ast.literal_eval(text) if dialect == "pythonic" else json.loads(text)


NOISE = [
    *dict.fromkeys(mark for dialect in DIALECTS.values() for mark in dialect.marks),
    *("{", "}", "[", "]", "(", ")", '"', "'", ",", ":", "=", ";", "\\", "\n", " ", "/", "<", ">", "```json\n", "```"),
    *("true", "True", "null", "None", "nan", "1e999", "-", "0x1", "007", "\\ud800", "\x00", "é", "✈️", "\u2028"),
    *('{"name": "w", "arguments": {}}', '"name": ', '"arguments": ', '"parameters": ', "w(city=", "<function=w>\n"),
    *("<parameter=city>\n", "\n</parameter>\n", "</function>", "[ARGS]", "[CALL_ID]", '{"a": ', "[1, ", "((", "[[[["),
]
