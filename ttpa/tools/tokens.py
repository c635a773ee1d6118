"""Which characters each token wrote, worked out from the token ids themselves."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from ttpa.errors import InputError
from ttpa.tools.json_scan import Span


def token_spans(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of the token ids and, for each token, the half-open span of characters it wrote a part of.

    Works from the ids, which need not be those that encoding the text would give: every id stands for some bytes
    (byte-level alphabet, or SentencePiece pieces with `<0xNN>`), special and added tokens for their text, ids outside
    of the vocabulary for nothing. A character split over several tokens belongs to each of them. Bytes that are no
    UTF-8 become one U+FFFD each. Raises InputError for a tokenizer of another kind.
    """
    to_bytes = _bytes_of_piece(tokenizer)
    added = tokenizer.added_tokens_decoder
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    parts = [
        b"" if piece is None else added[i].content.encode() if i in added else to_bytes(piece)
        for i, piece in zip(ids, pieces, strict=True)
    ]
    # A surrogate stands for exactly one undecodable byte, so every character's number of bytes stays known.
    characters = b"".join(parts).decode("utf-8", "surrogateescape")
    text = "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in characters)
    ends = list(accumulate(1 if "\udc80" <= c <= "\udcff" else len(c.encode()) for c in characters))
    spans = []
    start = 0
    for part in parts:
        end = start + len(part)
        first = bisect_right(ends, start)
        spans.append((first, bisect_left(ends, end) + 1 if part else first))
        start = end
    return text, spans


def completion_text(tokenizer: Any, ids: Sequence[int], *, marks: Collection[str] = ()) -> tuple[str, list[Span]]:
    """As `token_spans`, but the text ends before the special tokens (end of turn, padding) at the end of the ids, and
    before the space that a template writes behind them.

    The spans of these tokens lie behind the text, so the position at its end belongs to the end-of-turn token. Special
    tokens among `marks` are text: they close a call, not a turn.
    """
    text, spans = token_spans(tokenizer, ids)
    added, length = tokenizer.added_tokens_decoder, len(ids)
    for at in reversed(range(len(ids))):
        if ids[at] in added and _ends_turn(added[ids[at]], marks):
            length = at
        elif text[slice(*spans[at])].strip():
            break
    return text[: spans[length][0]] if length < len(ids) else text, spans


def _ends_turn(token: Any, marks: Collection[str]) -> bool:
    return token.special and token.content not in marks


def tokens_of(span: Span, spans: Sequence[Span]) -> tuple[int, int]:
    """The half-open range of tokens that overlap a span of characters, by the smallest overlap.

    An empty span means the token that holds the character at that position. The range is empty if there is none: a
    position at the end of a text that was cut off lies at (number of tokens, number of tokens).
    """
    start, end = span[0], max(span[1], span[0] + 1)
    first = bisect_right(spans, start, key=lambda s: s[1])
    return first, bisect_left(spans, end, key=lambda s: s[0])


def _bytes_of_piece(tokenizer: Any) -> Callable[[str], bytes]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else backend.decoder
    kinds = _decoder_kinds(json.loads(decoder.__getstate__())) if decoder is not None else set()
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds & {"ByteFallback", "Metaspace"}:
        return _sentencepiece
    raise InputError(
        "cannot tell which characters each token wrote: the tokenizer must be a fast one, byte-level or SentencePiece, "
        f"and this is {type(tokenizer).__name__} with the decoder {sorted(kinds) or None}"
    )


def _decoder_kinds(state: dict[str, Any]) -> set[str]:
    return {state["type"]}.union(*(_decoder_kinds(part) for part in state.get("decoders", [])))


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes printable bytes as themselves and the others, in order, as characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _byte_level(piece: str) -> bytes:
    alphabet = _byte_alphabet()
    return bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else piece.encode()


def _sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()
