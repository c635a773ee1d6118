"""Who speaks where in a trajectory: the model, a user, a tool, or the chat template between them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from ttpa.tools.json_scan import Span
from ttpa.tools.tokens import token_spans

Speaker = Literal["model", "tool", "prompt", "given", "end", "template"]

_RESULTS = {
    "<tool_response>": "</tool_response>",  # Qwen, Hermes
    "<|tool_response>": "<tool_response|>",  # Gemma 4
    "[TOOL_RESULTS]": "[/TOOL_RESULTS]",  # Mistral
    "<｜tool▁outputs▁begin｜>": "<｜tool▁outputs▁end｜>",  # DeepSeek
}
_MARK = re.compile(
    r"""
      <\|im_start\|>(?P<chatml>[\w-]*)\n?
    | <\|(?:start_header_id|header_start)\|>(?P<llama>[^<\n]*)<\|(?:end_header_id|header_end)\|>\n*
    | <(?:start_of_turn|\|turn)>(?P<gemma>\w*)\n
    | <\|START_OF_TURN_TOKEN\|><\|(?P<cohere>\w+)_TOKEN\|>
      # gpt-oss: in a turn of its own the model writes what stands behind the role
    | <\|start\|>(?P<harmony>assistant|[^<\n]*(?:<\|channel\|>[^<\n]*)?<\|message\|>)
    | (?P<alone> <\|(?:system|user|assistant|observation|tool)\|>\n?  # GLM, Phi
        | <｜(?:User|Assistant)｜>                                    # DeepSeek
        | \[/?(?:INST|SYSTEM_PROMPT)\] )                              # Mistral
    | (?P<result> RESULT )
    """.replace("RESULT", "|".join(map(re.escape, _RESULTS))),
    re.VERBOSE,
)
_ROLES: dict[str, Speaker] = {
    **dict.fromkeys(("assistant", "model", "chatbot", "/inst"), "model"),
    **dict.fromkeys(("tool", "ipython", "observation", "function", "functions"), "tool"),
}


@dataclass(frozen=True)
class Stretch:
    """Characters from `start` to `end` of a trajectory's text, all of one speaker: the `model`, a `tool` (tags around
    its result included), `prompt` for users and the system; `given` is what the model did not write inside of a turn
    that looks like its own, `end` a token that ends a turn, `template` a turn's header and the space before it."""

    speaker: Speaker
    start: int
    end: int


def read_stretches(
    tokenizer: Any, ids: Sequence[int], *, written: Sequence[int], marks: Collection[str] = ()
) -> tuple[str, list[Span], list[Stretch]]:
    """The text of the ids of a trajectory, the half-open span of characters of each token, and who speaks where.

    The ids start inside a turn of the model; the stretches cover the text without gaps. Turns are told by the headers
    that the templates of the large families write, with tokens of their own; where nothing ended the model's turn,
    such a token is part of what it says, as are special tokens among `marks`, which open and close calls. In templates
    of other families `written`, 1 for each token that the model wrote and 0 for others, tells the model's words from
    what is `given`. Raises InputError for a tokenizer that `token_spans` cannot read.
    """
    text, spans = token_spans(tokenizer, ids)
    added = tokenizer.added_tokens_decoder
    starts = {span[0] for i, span in zip(ids, spans, strict=True) if i in added}
    ends = {
        span[1]: span[0]
        for i, span in zip(ids, spans, strict=True)
        if i in added and added[i].special and added[i].content not in marks
    }
    unwritten: list[Span] = []
    for wrote, tokens in groupby(zip(written, spans, strict=True), key=lambda token: bool(token[0])):
        run = [span for _, span in tokens]
        if not wrote:
            unwritten.append((run[0][0], run[-1][1]))
    stretches = [part for stretch in _by_marks(text, starts, ends) for part in _split(stretch, unwritten, text)]
    return text, spans, [stretch for stretch in stretches if stretch.start < stretch.end]


def _by_marks(text: str, starts: Collection[int], ends: Mapping[int, int]) -> Iterator[Stretch]:
    """`starts` are the positions of added tokens, `ends` gives the start of each special token by its end."""
    speaker: Speaker = "model"
    at = done = 0
    after_result = False
    while mark := _MARK.search(text, done):
        start, done = mark.span()
        if speaker == "model" and done == len(text) and ends.get(done) == start:
            break  # the model stopped with it
        content = list(_content(speaker, text, at, start, ends))
        over = speaker != "model" or content[0].end < start or (after_result and at == start)
        if mark["result"]:
            # Gemma 4 stops at this tag itself: no other token ends its turn before a result
            if mark["result"] == "<|tool_response>" and start in starts:
                content = [Stretch(speaker, at, start)]
            elif not over:
                continue
            yield from content
            close = _RESULTS[mark["result"]]
            found = text.find(close, done)
            done = len(text) if found < 0 else found + len(close)
            yield Stretch("tool", start, done)
        elif start in starts and (over or mark["alone"]):
            yield from content
            yield Stretch("template", start, done)
            speaker = _speaker(mark[mark.lastgroup or 0])
        else:
            continue
        at, after_result = done, bool(mark["result"])
    yield from _content(speaker, text, at, len(text), ends)


def _speaker(role: str) -> Speaker:
    word = re.search(r"/?[a-z]+", role.lower())
    return _ROLES.get(word[0] if word else "", "prompt")


def _content(speaker: Speaker, text: str, start: int, stop: int, ends: Mapping[int, int]) -> Iterator[Stretch]:
    """What is said from `start` to `stop`, the special tokens that end it, and the space behind them."""
    space = stop
    while space > start and text[space - 1].isspace():
        space -= 1
    end = space
    while ends.get(end, -1) >= start:
        end = ends[end]
    if start < end == space:
        space = end = stop
    yield Stretch(speaker, start, end)
    yield Stretch("end", end, space)
    yield Stretch("template", space, stop)


def _split(stretch: Stretch, unwritten: Sequence[Span], text: str) -> Iterator[Stretch]:
    """Tell what the model did not write from what it wrote; a turn of which it wrote nothing stays one."""
    at = stretch.start
    if stretch.speaker == "model":
        for run in unwritten:
            start, end = max(run[0], at), min(run[1], stretch.end)
            if start >= end or (start, end) == (stretch.start, stretch.end):
                continue
            # next to a header it is what the template opens and closes a turn with
            beside = run[0] < start or run[1] > end or not text[start:end].strip()
            yield Stretch("model", at, start)
            yield Stretch("template" if beside else "given", start, end)
            at = end
    yield Stretch(stretch.speaker, at, stretch.end)
