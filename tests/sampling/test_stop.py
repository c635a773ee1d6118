"""Where an answer ends."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from ttpa.errors import InputError
from ttpa.sampling.stop import Stop, end_ids

TAG = "</tool_call>"
PARTS = ["<", "/", "t", "o", "l", "_", "c", "a", ">", " ", "x", "</", "tool", "_call", "call", ">x", "x>", "l>", "。"]


def byte_level():
    """Single bytes, and some tokens of several characters and of parts of characters."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letter = {byte: chr(byte) for byte in printable}
    letter |= {byte: chr(0x100 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in letter)}
    ideogram, emoji = "。".encode(), "🙂".encode()
    written = [bytes([byte]) for byte in range(256)]
    written += [part.encode() for part in PARTS if len(part) > 1 or part == "。"]
    written += [ideogram[:2], ideogram[1:], emoji[1:] + b"<", emoji[:3]]
    vocabulary = {"".join(letter[byte] for byte in part): i for i, part in enumerate(written)}
    return vocabulary, written, decoders.ByteLevel()


def sentencepiece():
    """Pieces with a sign for the space, and single bytes."""
    parts = [*PARTS, " a", "a "]
    written = [part.encode() for part in parts] + [bytes([byte]) for byte in range(256)]
    names = [part.replace(" ", "\u2581") for part in parts] + [f"<0x{byte:02X}>" for byte in range(256)]
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return {name: i for i, name in enumerate(names)}, written, decoders.Sequence(steps)


@pytest.fixture(scope="module", params=[byte_level, sentencepiece])
def spelling(request):
    """A tokenizer and the bytes that each of its tokens writes."""
    vocabulary, written, decoder = request.param()
    pieces = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    pieces.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=pieces), written


def splits(text, written, generator):
    """The text as tokens that are drawn among those that write its next bytes."""
    rest, ids = text.encode(), []
    while rest:
        fits = [i for i, part in enumerate(written) if rest.startswith(part)]
        longest = max(fits, key=lambda i: len(written[i]))
        ids.append(generator.choice([longest, *fits]))
        rest = rest[len(written[ids[-1]]) :]
    return ids


def ending(ids, written, text, first=0):
    """What `Stop.at` is, from the bytes of all tokens."""
    for count in range(first + 1, len(ids) + 1):
        upto, before = (b"".join(written[i] for i in ids[:n]) for n in (count, count - 1))
        if any(upto[:n].endswith(text.encode()) for n in range(len(before) + 1, len(upto) + 1)):
            return count
    return None


@pytest.mark.parametrize("text", [TAG, "。", "l>", "> ", " x", "oo", "🙂。"])
def test_a_stop_text_ends_an_answer_however_it_is_split_over_tokens(spelling, text):
    tokenizer, written = spelling
    generator = random.Random(0)
    stop = Stop(tokenizer, [], text)
    found = set()
    for _ in range(60):
        before = "".join(generator.choice([*PARTS, "🙂", TAG[:-1]]) for _ in range(generator.randrange(6)))
        ids = splits(before + text + generator.choice(["", ">", " x", TAG]), written, generator)
        assert stop.at(ids, 0) == ending(ids, written, text)
        assert stop.cut(ids) == ids[: stop.at(ids, 0)]
        for first in range(len(ids) + 1):
            assert stop.at(ids, first) == ending(ids, written, text, first)
        found.add(stop.at(ids, 0))
    assert len(found) > 3


def test_an_answer_without_the_text_goes_on(spelling):
    tokenizer, written = spelling
    ids = splits("< /tool_call> </tool_call </tool_ call>", written, random.Random(0))
    stop = Stop(tokenizer, [], TAG)
    assert stop.at(ids, 0) is None and stop.cut(ids) == ids


def test_a_token_that_begins_in_the_text_and_writes_more_is_kept_whole(spelling):
    tokenizer, written = spelling
    ids = [written.index(part.encode()) for part in ("</", "tool", "_call", ">x", "x")]
    assert Stop(tokenizer, [], TAG).at(ids, 0) == 4


def test_the_first_of_text_and_end_token_ends_an_answer(tokenizer):
    ids = tokenizer("<tool_call>a</tool_call><|im_end|>", add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id
    assert ids[-1] == eos and len(ids) == 4
    assert Stop(tokenizer, [eos]).at(ids, 0) == 4
    assert Stop(tokenizer, [eos], TAG).at(ids, 0) == 3
    assert Stop(tokenizer, [eos], TAG).at(ids, 3) == 4
    assert Stop(tokenizer, [eos, ids[1]], TAG).cut(ids) == ids[:2]
    assert Stop(tokenizer, [eos]).at(ids[:3], 0) is None


def test_ids_outside_of_the_vocabulary_write_nothing(tokenizer):
    assert Stop(tokenizer, [], TAG).at([len(tokenizer) + 5] * 3, 0) is None


def test_a_tokenizer_that_cannot_be_read_token_by_token_is_refused_for_a_text_only():
    pieces = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    unreadable = PreTrainedTokenizerFast(tokenizer_object=pieces)
    assert Stop(unreadable, [0]).at([0], 0) == 1
    with pytest.raises(InputError, match="byte-level"):
        Stop(unreadable, [0], TAG)


def test_end_ids_come_from_model_and_tokenizer(tiny_model, tokenizer):
    tiny_model.generation_config.eos_token_id = [3, 1]
    tiny_model.config.eos_token_id = 7
    assert end_ids(tiny_model, tokenizer) == sorted({1, 3, 7, tokenizer.eos_token_id})


def test_a_gold_answer_with_another_end_is_refused(tokenizer):
    stop = Stop(tokenizer, [tokenizer.eos_token_id])
    stop.check([5, tokenizer.eos_token_id])
    with pytest.raises(InputError, match=r"ends turns with .*add its id \(5\)"):
        stop.check([tokenizer.eos_token_id, 5])
    Stop(tokenizer, [tokenizer.eos_token_id], "</tool_call>").check([5])
