"""Decisions: the places of a dialogue at which the assistant calls tools, each with its prompt and its gold answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ttpa.data.dialogues import Dialogue
from ttpa.data.messages import Message, calls_of
from ttpa.data.render import Unwritable, render_messages, template_messages
from ttpa.errors import InputError
from ttpa.tools.call import Call, call_from_message
from ttpa.tools.dialects.detect import find_dialect


@dataclass(frozen=True)
class Decision:
    """One assistant message that calls tools. `turn` is its index in the dialogue, `messages` stand before it,
    `prompt_ids` end where the assistant begins, `gold_ids` end with the end-of-turn token. `dropped` says why the
    decision cannot be used, None where it can."""

    dialogue: str
    turn: int
    tools: list[dict[str, Any]]
    messages: list[Message]
    calls: list[Call]
    prompt_ids: list[int]
    gold_ids: list[int]
    source: dict[str, Any]
    dropped: str | None = None

    @property
    def id(self) -> str:
        """The dialogue and the turn as one text."""
        return f"{self.dialogue}:{self.turn}"


def decisions(dialogue: Dialogue, tokenizer: Any, *, max_length: int | None = None) -> list[Decision]:
    """The decisions of a dialogue in their order, each after the gold messages before it. One whose prompt and gold
    answer have more than `max_length` tokens together (None: any number), or cannot be written by the chat template,
    is returned with `dropped` set. Raises InputError, naming the dialogue, for messages that the chat template refuses,
    and for a template that ends the assistant's turn neither with the tokenizer's end-of-text token (eos_token) nor
    with another special token."""
    found = []
    for turn, message in enumerate(dialogue.messages):
        records = calls_of([message]) if message["role"] == "assistant" else []
        if not records:
            continue
        before = dialogue.messages[:turn]
        prompt_ids: list[int] = []
        gold_ids: list[int] = []
        dropped = None
        try:
            rendered = render_messages(tokenizer, before, [[message]], tools=dialogue.tools)
            prompt_ids, gold_ids = rendered.prompt_ids, _turn(rendered.completions[0], tokenizer)
        except Unwritable:
            dropped = "the chat template cannot write it"
        except InputError as error:
            raise InputError(f"dialogue {dialogue.id!r}, message {turn}: {error}") from None
        if max_length is not None and len(prompt_ids) + len(gold_ids) > max_length:
            dropped = "over max_length"
        found.append(
            Decision(
                dialogue=dialogue.id,
                turn=turn,
                tools=dialogue.tools,
                messages=before,
                calls=[call_from_message(record) for record in records],
                prompt_ids=prompt_ids,
                gold_ids=gold_ids,
                source=dialogue.source,
                dropped=dropped,
            )
        )
    return found


def all_decisions(dialogues: Iterable[Dialogue], tokenizer: Any, *, max_length: int | None = None) -> list[Decision]:
    """The decisions of all dialogues in their order; see `decisions`."""
    return [d for dialogue in dialogues for d in decisions(dialogue, tokenizer, max_length=max_length)]


def check_template(decision: Decision, tokenizer: Any) -> None:
    """Raise InputError where the chat template drops the tools: a prompt reads the same with and without them."""
    messages, _ = template_messages(tokenizer, decision.messages)
    render = partial(tokenizer.apply_chat_template, messages, tokenize=False, add_generation_prompt=True)
    with_tools = render(tools=decision.tools)
    try:
        without = render(tools=None)
    except Exception:  # a template is a foreign program, and one that cannot do without tools does not drop them
        return
    if with_tools == without:
        raise InputError(
            f"dialogue {decision.dialogue!r}: the chat template of the tokenizer drops the tools, so the model would "
            "not know what it can call: use the instruct version of the model, or a template that writes tools"
        )


def _turn(ids: list[int], tokenizer: Any) -> list[int]:
    """The tokens of a rendered turn without what a template writes after the end-of-turn token. Some models end turns
    with a special token that is not their tokenizer's eos_token."""
    added, dialect = tokenizer.added_tokens_decoder, find_dialect(tokenizer)
    marks = () if dialect is None else dialect.marks
    special = [at for at, i in enumerate(ids) if i in added and added[i].special and added[i].content not in marks]
    ends = [at for at, i in enumerate(ids) if i == tokenizer.eos_token_id] or special
    if not ends:
        raise InputError("the chat template does not end the turn of the assistant with eos_token or a special token")
    return ids[: ends[-1] + 1]
