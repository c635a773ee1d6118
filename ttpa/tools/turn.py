"""A model's turn as far as it could be read: its calls, where their parts stand, and what is wrong with the format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ttpa.tools.json_scan import Span


@dataclass(frozen=True)
class Field:
    """One value inside the arguments and where it stands, quotes included.

    `key_span` is None for items of an array. `element_span` covers key and value where more than a comma belongs to
    them (the tags of an XML element), else it is None.
    """

    key_span: Span | None
    value_span: Span
    value: Any
    element_span: Span | None = None


@dataclass
class ParsedCall:
    """One call as far as it could be read. All spans are half-open, in characters of the text that was parsed.

    `span` covers the tags, `inner_span` what stands between them, `name_span` the quotes of the name if it has some,
    `close_span` the bracket or tag at which the arguments ended (the outer one if there were no arguments, None if the
    text broke off before it). `fields` holds every value inside the arguments by its JSON pointer, "" being the
    arguments themselves; `duplicates` the second and later values of keys that came twice (`fields` and `arguments`
    hold the last one). `complete` says whether the call was read to its end; if not, `arguments` holds what was closed
    by then. The spans are None for a call that was given as a record; of one that was read by a parser that keeps no
    positions only `span` is known, and `fields` is empty.
    """

    index: int
    name: str | None
    arguments: dict[str, Any] | None
    span: Span | None = None
    inner_span: Span | None = None
    name_span: Span | None = None
    fields: dict[str, Field] = field(default_factory=dict)
    close_span: Span | None = None
    complete: bool = True
    duplicates: list[tuple[str, Field]] = field(default_factory=list)


@dataclass(frozen=True)
class FormatError:
    """What is wrong with the text of a call, and where.

    `code` is format.unparseable (the text cannot be read as a call), format.envelope (the call can be read, but a tag
    or the arguments are not as they must be) or format.repairable (readable, but not as the dialect writes it: a fence,
    single quotes or Python words in JSON, arguments as text). `call` is -1 for a closing tag before the first call.
    """

    code: str
    call: int
    span: Span
    message: str


@dataclass
class ParsedTurn:
    """A model's turn: its text, the calls in it, what is wrong with their format, and the text outside of them."""

    text: str
    calls: list[ParsedCall]
    errors: list[FormatError]
    content: str
