"""Tool calls as Python writes them, `[f(a=1, b="x"), g()]`: Llama 4, ToolACE and, in tags of their own, LFM2 models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ttpa.tools.dialects.dialect import Dialect
from ttpa.tools.dialects.json_calls import FENCE, Report, new_call, read_arguments, skip_space
from ttpa.tools.json_scan import JsonError, Member, Span, Value
from ttpa.tools.python_scan import scan
from ttpa.tools.turn import FormatError, ParsedCall, ParsedTurn

LFM2_OPEN = "<|tool_call_start|>"
CLOSE_OF = {"<|python_start|>": "<|python_end|>", LFM2_OPEN: "<|tool_call_end|>"}
OPEN_OF = {close: opening for opening, close in CLOSE_OF.items()}

# The text of a call up to the parenthesis that opens its arguments. A name may hold spaces, punctuation and one pair of
# parentheses (ToolACE has such tools), so that parenthesis is the first one behind which arguments stand: a key,
# nothing, or the end of a text that was cut off there.
_KEY_TEXT = r"""[^\s=,()'"\[\]{}][^=,()'"{}\n]*=(?!=)"""
_NAME_TEXT = r"""[^\s()\[\]='"{}<>,][^\n()\[\]="{}]*"""
_ARGUMENTS_TEXT = rf"""\s*(?:\)|{_KEY_TEXT}|\Z|[^\s=,()'"\[\]{{}}][^=,()'"{{}}\n]*\Z)"""
_CALL_TEXT = rf"""{_NAME_TEXT}(?:\([^\n()\[\]="{{}}]*\)[^\n()\[\]="{{}}]*)??\((?={_ARGUMENTS_TEXT})"""
_TAG_TEXT = "|".join(map(re.escape, [*CLOSE_OF, *OPEN_OF]))

_MARK = re.compile(rf"{_TAG_TEXT}|^[ \t]*(?P<line>(?:```\w*\s*)?\[)|\[", re.MULTILINE)
_TAG = re.compile(_TAG_TEXT)
_CLOSE = re.compile(rf"\s*({'|'.join(map(re.escape, OPEN_OF))})")
_TAG_OR_BRACKET = re.compile(rf"{_TAG_TEXT}|[\[\]]")
_KEY = re.compile(_KEY_TEXT)
_CALL = re.compile(_CALL_TEXT)
_CALL_WITHOUT_KEYS = re.compile(rf"{_NAME_TEXT}\(")
_PLAIN_NAME = re.compile(r"[\w.:/-]+")
_BARE = re.compile(rf"\s*(?:```\w*\s*)?(?={_PLAIN_NAME.pattern}\(){_CALL_TEXT}")
_COMMA = re.compile(r"\s*,\s*")
_NO_COMMA = re.compile(rf"\s*(?:;\s*)?(?={_PLAIN_NAME.pattern}\s*\()(?={_CALL_TEXT})")
_GOES_ON = re.compile(
    rf"\)(?=\s*,\s*{_CALL_TEXT})|\)(?=\s*\](?!\s*[,)\]}}]))|(?={_TAG_TEXT})|(?<=\n)(?=\[\s*{_CALL_TEXT})"
)

_LOOSE = {"(": "a tuple instead of a list", "'": "a line break in a string", '"': "a line break in a string"}


def parse(text: str, tools: Sequence[dict[str, Any]] = ()) -> ParsedTurn:
    """Find the calls in a model's turn. Never raises; what cannot be read becomes a FormatError with its position.

    The end-of-turn token must be stripped before. Calls stand in a list, in the tags of Llama 4 or LFM2 or without any;
    without, a bracket opens a list where the beginning of a call follows (a name of spaces and punctuation only at the
    start of a line, one without keys only if the list is the whole turn), and calls without brackets are read if they
    are the whole turn. A call ends where its literals have been read, so a bracket or tag inside a string is text;
    where they are broken, behind the next parenthesis at which the list goes on or ends. The span of a call reaches
    from the end of the one before over the comma, those of the first and the last over brackets and tags. An argument
    without a key is reported and not among the arguments. In LFM2's tags JSON's words inside lists and dicts, and line
    breaks in strings, are as its templates write them; elsewhere they are reported.
    """
    turn = ParsedTurn(text, [], [], "")
    if _BARE.match(text):
        end = _read_list(turn, start := skip_space(text, 0), start)
        if all(call.complete for call in turn.calls) and skip_space(text, end) == len(text):
            return turn
        turn = ParsedTurn(text, [], [], "")
    first = skip_space(text, 0)
    kept: list[str] = []
    done = at = 0
    while mark := _MARK.search(text, at):
        start, at = mark.span("line" if mark["line"] else 0)
        if mark[0] in OPEN_OF:
            message = "a closing tag without a call"
            turn.errors.append(FormatError("format.envelope", len(turn.calls) - 1, mark.span(), message))
        elif mark[0] in CLOSE_OF:
            at = _read_list(turn, start, at)
        elif _opens_list(text, at, line=bool(mark["line"]), turn=start == first):
            at = _read_list(turn, start, start)
        else:
            continue
        kept.append(text[done:start])
        done = at
    turn.content = "".join([*kept, text[done:]]).strip()
    return turn


def _opens_list(text: str, at: int, *, line: bool, turn: bool) -> bool:
    """Whether the bracket before `at`, the first thing of its line or of the turn or not, is meant as a list of calls
    and not as part of an explanation."""
    at = skip_space(text, at)
    if call := _CALL.match(text, at):
        return line or bool(_PLAIN_NAME.fullmatch(call[0][:-1].rstrip()))
    plain = _PLAIN_NAME.match(text, at)
    return turn and plain is not None and text.startswith("(", plain.end()) and text.rstrip().endswith(")]")


def _read_list(turn: ParsedTurn, start: int, body: int) -> int:
    """Read the calls of the list that starts at `start`, its tag included, and whose body starts at `body`; return
    where it ends."""
    text, tag, index = turn.text, turn.text[start:body], len(turn.calls)
    fence = FENCE.match(text, body)
    at = skip_space(text, fence.end() if fence else body)
    if fence:
        _report(turn, "repairable", index, fence.span(1), "a fence around the calls")
    in_brackets = text.startswith("[", at)
    if not in_brackets and _CALL_WITHOUT_KEYS.match(text, at):
        _report(turn, "envelope", index, (at, at + 1), "[ is missing")
    at += in_brackets
    ends = True
    if in_brackets and text.startswith("]", skip_space(text, at)):
        _report(turn, "envelope", index - 1, (at - 1, skip_space(text, at) + 1), "a list without a call")
    else:
        at, ends = _read_calls(turn, start, at, tag)
    if ends and in_brackets:
        at = _expect(turn, "]", at, _TAG_OR_BRACKET)
    if ends and fence and (fence_end := FENCE.match(text, at)):
        at = fence_end.end()
    if not tag:
        close = _CLOSE.match(text, at)
        if close:
            _report(turn, "envelope", index, (start, start + 1), f"{OPEN_OF[close[1]]} is missing")
            at = close.end()
    elif ends:
        at = _expect(turn, CLOSE_OF[tag], at, _TAG)
    elif text.startswith(CLOSE_OF[tag], at):
        at += len(CLOSE_OF[tag])
    if len(turn.calls) > index:
        last = turn.calls[-1]
        assert last.span is not None  # it was read from text
        last.span = (last.span[0], at)
    return at


def _read_calls(turn: ParsedTurn, start: int, at: int, tag: str) -> tuple[int, bool]:
    """Read one call after the other from `at` on; return where the last one ends, and whether the list goes on to its
    end behind it (else it was broken off there)."""
    text = turn.text
    while True:
        inner = skip_space(text, at)
        call, report = new_call(turn)
        at, error = _read_call(call, inner, text, report, tag)
        goes_on = None
        if error is not None:
            call.complete = False
            goes_on = _GOES_ON.search(text, error.position)
            at = goes_on.end() if goes_on else len(text)
            report("unparseable", (error.position, at), error.message)
        call.span, call.inner_span = (start, at), (inner, at)
        if error is not None and not (goes_on and goes_on[0]):
            return at, False
        start = at
        if comma := _COMMA.match(text, at):
            at = comma.end()
            if at == len(text) or _TAG_OR_BRACKET.match(text, at):
                return at, True
        elif gap := _NO_COMMA.match(text, at):
            report("repairable", gap.span(), "no comma between two calls")
            at = gap.end()
        else:
            return at, True


def _read_call(call: ParsedCall, at: int, text: str, report: Report, tag: str) -> tuple[int, JsonError | None]:
    """Read the call that starts at `at`; return where it ends or, with the error, where it breaks."""
    head = _CALL.match(text, at) or _CALL_WITHOUT_KEYS.match(text, at)
    if head is None:
        return at, JsonError(at, "expected a name and '('")
    call.name = head[0][:-1].rstrip()
    call.name_span = (at, at + len(call.name))
    arguments = Value({}, (head.end() - 1, head.end()), closed=False)
    loose: list[Span] = []
    error: JsonError | None = None
    at = skip_space(text, head.end())
    while error is None and not text.startswith(")", at):
        key = _KEY.match(text, at)
        read = scan(text, key.end() if key else at)
        in_container = read.root is not None and isinstance(read.root.value, dict | list)
        loose += [
            span for span in read.loose if not (tag == LFM2_OPEN and _as_lfm2_writes(text[span[0]], in_container))
        ]
        if read.root is not None and key:
            name = key[0][:-1].rstrip()
            arguments.members.append(Member(name, (at, at + len(name)), read.root))
            arguments.value[name] = read.root.value
        elif read.root is not None:
            report("envelope", read.root.span, "an argument without a key")
        at, error = skip_space(text, read.end), read.error
        if error is None and text.startswith(",", at):
            at = skip_space(text, at + 1)
        elif error is None and not text.startswith(")", at):
            error = JsonError(at, "expected ',' or ')'")
    if loose:
        report("repairable", loose[0], _LOOSE.get(text[loose[0][0]], "true, false or null instead of Python's words"))
    arguments.closed = error is None
    arguments.span = (arguments.span[0], error.position if error else at + 1)
    read_arguments(call, arguments, text, report)
    return arguments.span[1], error


def _as_lfm2_writes(first: str, in_container: bool) -> bool:
    """Whether LFM2's templates write what only starts with this character is not Python: containers are JSON."""
    return first in "'\"" or (first in "tfn" and in_container)


def _expect(turn: ParsedTurn, wanted: str, at: int, stops: re.Pattern[str]) -> int:
    """The end of the bracket or tag that must stand at `at`; reported are text before it, or that it is missing, which
    it is if something else of `stops` comes first."""
    found, index = stops.search(turn.text, at), len(turn.calls) - 1
    if found is None or found[0] != wanted:
        _report(turn, "envelope", index, (at, at), f"{wanted} is missing")
        return at
    extra = skip_space(turn.text, at)
    if extra < found.start():
        _report(turn, "unparseable", index, (extra, found.start()), f"text between the calls and {wanted}")
    return found.end()


def _report(turn: ParsedTurn, kind: str, call: int, span: Span, message: str) -> None:
    turn.errors.append(FormatError(f"format.{kind}", call, span, message))


PYTHONIC = Dialect("pythonic", parse, marks=(*CLOSE_OF, *OPEN_OF))
