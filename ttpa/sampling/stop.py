"""Where an answer ends: at a token that ends the turn, or at a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from ttpa.errors import InputError
from ttpa.tools.tokens import token_spans, tokens_of


def end_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The token ids that end a turn: those of the model's generation config and config, and the tokenizer's."""
    found: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return sorted(found)


class Stop:
    """The end of answers: one of the token ids `ends` or, where `text` is given, the token that completes it, however
    it is split over tokens. Raises InputError for a text with a tokenizer whose tokens cannot be read one by one."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], text: str | None = None) -> None:
        self.tokenizer, self.ends, self.text = tokenizer, list(ends), text
        self._ends = frozenset(ends)
        self._may_complete: dict[int, bool] = {}
        if text is not None:
            self._reach = len(text.encode())  # every token writes one byte or more
            token_spans(tokenizer, [])

    def check(self, answer: Sequence[int]) -> None:
        """Raise InputError where an answer as the chat template writes it ends with a token that ends nothing here: the
        model could not end it either."""
        if answer and self.text is None and answer[-1] not in self._ends:
            token = self.tokenizer.convert_ids_to_tokens(answer[-1])
            raise InputError(
                f"the chat template ends turns with {token!r}, which is no end-of-text token of the model: add its id "
                f"({answer[-1]}) to eos_token_id in generation_config.json"
            )

    def at(self, ids: Sequence[int], first: int) -> int | None:
        """How many of the tokens of a completion are kept, the one that ends it included; None where it does not end
        at position `first` or behind. What stands before `first` is read, but does not end the completion."""
        for position in range(first, len(ids)):
            if ids[position] in self._ends or self._completes(ids, position):
                return position + 1
        return None

    def cut(self, ids: Sequence[int]) -> list[int]:
        """The tokens up to the end of the completion, all of them where it does not end."""
        return list(ids[: self.at(ids, 0)])

    def _completes(self, ids: Sequence[int], position: int) -> bool:
        """Whether the token at `position` writes the last byte of the stop text."""
        if self.text is None or not self._writes_its_end(ids[position]):
            return False
        tail = ids[max(0, position + 1 - self._reach) : position + 1]
        text, spans = token_spans(self.tokenizer, tail)
        start = text.rfind(self.text)
        if start < 0:
            return False
        last = start + len(self.text) - 1
        return tokens_of((last, last + 1), spans)[1] == len(tail)

    def _writes_its_end(self, token: int) -> bool:
        """Whether a token can write the last byte of the stop text: cheap, as it is asked of every token."""
        assert self.text
        if token not in self._may_complete:
            text, _ = token_spans(self.tokenizer, [token])
            self._may_complete[token] = self.text[-1] in text or "\ufffd" in text
        return self._may_complete[token]
