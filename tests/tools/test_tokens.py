import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ttpa.errors import InputError
from ttpa.tools.tokens import completion_text, token_spans, tokens_of

TEXTS = ["", "Oslo", "Köln ✈️ und 日本語", '{"a": "ü"}', "<tool_call>\n{}\n</tool_call>", " two  spaces\n\ttab "]


def wordpiece():
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), unk_token="[UNK]"
    )


@pytest.fixture(scope="module")
def merged():
    """Byte-level with merges, so that tokens span several characters and split others."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=plain)


@pytest.fixture(scope="module")
def sentencepiece():
    """Pieces with a lower one eighth block for the space, and bytes for what is not in the vocabulary."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"Oslnd", "ln"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[("l", "n")], byte_fallback=True, unk_token="<unk>"))
    plain.normalizer = normalizers.Replace(" ", "\u2581")
    plain.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")


def check(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    read, spans = token_spans(tokenizer, ids)
    assert read == text and len(spans) == len(ids)
    at = 0
    for start, end in spans:
        assert start <= at <= end and start < end
        at = end
    assert at == len(text)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["tokenizer", "merged", "sentencepiece"])
def test_spans_cover_the_text_without_gaps(request, kind, text):
    check(request.getfixturevalue(kind), text)


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_spans_cover_any_text(tokenizer, text):
    check(tokenizer, text)


def test_a_character_belongs_to_each_of_its_tokens(tokenizer):
    ids = tokenizer("aü✈b", add_special_tokens=False)["input_ids"]
    assert token_spans(tokenizer, ids)[1] == [(0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3), (3, 4)]


def test_a_token_may_end_inside_a_character(merged):
    ids = merged("日本語", add_special_tokens=False)["input_ids"]
    text, spans = token_spans(merged, ids[:-1])
    assert text.startswith("日") and len(spans) == len(ids) - 1


def test_sampled_ids_need_not_be_those_of_the_text(merged):
    single = merged.convert_tokens_to_ids(list("Oslo"))
    assert single != merged("Oslo", add_special_tokens=False)["input_ids"]
    assert token_spans(merged, single) == ("Oslo", [(0, 1), (1, 2), (2, 3), (3, 4)])


def test_broken_bytes_become_one_mark_each(tokenizer):
    ids = tokenizer("ü", add_special_tokens=False)["input_ids"]
    assert token_spans(tokenizer, [ids[1], ids[0]]) == ("\ufffd\ufffd", [(0, 1), (1, 2)])


def test_special_and_unknown_ids(tokenizer):
    ids = [tokenizer.convert_tokens_to_ids("<tool_call>"), len(tokenizer) + 5, tokenizer.eos_token_id]
    assert token_spans(tokenizer, ids) == ("<tool_call><|im_end|>", [(0, 11), (11, 11), (11, 21)])


def test_spaces_and_bytes_of_sentencepiece(sentencepiece):
    ids = sentencepiece.convert_tokens_to_ids(["\u2581", "O", "<0xC3>", "<0xBC>"])
    assert token_spans(sentencepiece, ids) == (" Oü", [(0, 1), (1, 2), (2, 3), (2, 3)])


def test_other_tokenizers_are_refused():
    with pytest.raises(InputError, match="byte-level or SentencePiece"):
        token_spans(wordpiece(), [1])


def test_completion_text_ends_before_the_end_of_turn(tokenizer):
    ids = tokenizer("ab</tool_call><|im_end|><|endoftext|>", add_special_tokens=False)["input_ids"]
    text, spans = completion_text(tokenizer, ids)
    assert text == "ab</tool_call>" and len(spans) == 5
    assert tokens_of((len(text), len(text)), spans) == (3, 4)
    assert completion_text(tokenizer, ids[:3])[0] == text and completion_text(tokenizer, [])[0] == ""


def test_completion_text_ends_before_the_space_behind_the_end_of_turn_and_keeps_other_space(tokenizer):
    ids = tokenizer("ab\n<|im_end|>\n", add_special_tokens=False)["input_ids"]
    text, spans = completion_text(tokenizer, ids)
    assert text == "ab\n" and tokens_of((len(text), len(text)), spans) == (3, 4)
    assert completion_text(tokenizer, ids[:3])[0] == "ab\n", "no turn ends there"


def test_tokens_of():
    spans = [(0, 2), (2, 3), (2, 3), (3, 3), (3, 6)]
    assert tokens_of((0, 6), spans) == (0, 5)
    assert tokens_of((1, 2), spans) == (0, 1)
    assert tokens_of((1, 3), spans) == (0, 3)
    assert tokens_of((2, 3), spans) == (1, 3)
    assert tokens_of((2, 2), spans) == (1, 3)
    assert tokens_of((4, 5), spans) == (4, 5)
    assert tokens_of((5, 5), spans) == (4, 5)
    assert tokens_of((6, 6), spans) == (5, 5)
    assert tokens_of((0, 0), []) == (0, 0)


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1), st.data())
def test_tokens_of_is_overlap(lengths, data):
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    spans = list(zip([0, *ends], ends, strict=False))
    start = data.draw(st.integers(0, ends[-1] - 1))
    end = data.draw(st.integers(start + 1, ends[-1]))
    overlap = [i for i, (a, b) in enumerate(spans) if a < end and start < b]
    assert tokens_of((start, end), spans) == (overlap[0], overlap[-1] + 1)
