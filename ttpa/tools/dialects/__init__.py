"""Dialects: how models of different families write tool calls, and which of them a tokenizer's template writes."""

from ttpa.config import nearest
from ttpa.errors import InputError
from ttpa.tools.dialects.dialect import Dialect
from ttpa.tools.dialects.hermes import HERMES
from ttpa.tools.dialects.llama3_json import LLAMA3_JSON
from ttpa.tools.dialects.mistral import MISTRAL
from ttpa.tools.dialects.pythonic import PYTHONIC
from ttpa.tools.dialects.qwen3_coder import QWEN3_CODER

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect for dialect in (HERMES, LLAMA3_JSON, MISTRAL, PYTHONIC, QWEN3_CODER)
}
"""The dialects that are read with positions, by name."""


def dialect_named(name: str) -> Dialect:
    """The dialect of that name; raises InputError, with the nearest one, for a name that is none."""
    if name not in DIALECTS:
        close = nearest(name, DIALECTS)
        hint = f"did you mean {close}?" if close else f"the dialects are {', '.join(DIALECTS)}"
        raise InputError(f"unknown dialect {name!r}: {hint}")
    return DIALECTS[name]
