"""Messages to token ids: where the prompt ends, and which tokens the model wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ttpa.data.messages import Message, functions_of
from ttpa.errors import InputError
from ttpa.tools.dialects.detect import CallStyle, call_style
from ttpa.tools.json_scan import Span
from ttpa.tools.prefix import shared_length

_ID = re.compile("[0-9A-Za-z]{9}")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


class Unwritable(InputError):
    """Messages that are right, but that this chat template cannot write: they can be left out."""


@dataclass(frozen=True)
class Rendered:
    """Token ids of a prompt and of each completion after it, and per completion token 1 where the model wrote it (None:
    all of them). `moved` tokens at the end of the prompt rendered alone do not stand before a completion. `repairs` are
    (repair, detail) of what the chat template left out."""

    prompt_ids: list[int]
    completions: list[list[int]]
    trained: list[list[int] | None]
    moved: int
    repairs: list[tuple[str, str]] = field(default_factory=list)


def render_texts(tokenizer: Any, prompt: str, completions: Sequence[str]) -> Rendered:
    """Token ids of plain text, as TRL's DPOTrainer makes them: prompt and completion are encoded together, with the
    end-of-text token appended where it is missing, and the completion starts at the first token that differs from the
    prompt alone. Raises InputError for a tokenizer without end-of-text token and for an empty prompt or completion."""
    eos = tokenizer.eos_token
    if eos is None:
        raise InputError("the tokenizer has no end-of-text token (eos_token)")
    ended = [text if text.endswith(eos) else text + eos for text in completions]
    sequences = [list(_encoded(tokenizer, prompt + text)["input_ids"]) for text in ended]
    return _split(list(_encoded(tokenizer, prompt)["input_ids"]), sequences, [None] * len(sequences))


def render_messages(
    tokenizer: Any,
    prompt: list[Message],
    completions: Sequence[list[Message]],
    *,
    tools: list[dict[str, Any]],
    template_kwargs: dict[str, Any] | None = None,
) -> Rendered:
    """Token ids of a conversation through the tokenizer's chat template; the same ids as TRL's DPOTrainer makes.

    A completion of one assistant message is trained to its end, as in TRL. In a longer one, what stands between two
    turns of the model (the space after a turn, headers, tool results, user turns) is not trained. Raises InputError
    for a tokenizer without chat template, messages that the template refuses, calls that it would lose or change
    (`template_messages`), and a template that changes earlier turns when later ones follow, so that the tokens of a
    turn cannot be told (the turn is named).
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("messages need a tokenizer with a chat template, and this one has none")
    fed = [template_messages(tokenizer, completion, before=prompt) for completion in completions]
    prompt, repairs = template_messages(tokenizer, prompt)
    completions = [completion for completion, _ in fed]
    repairs = list(dict.fromkeys([*repairs, *(repair for _, found in fed for repair in found)]))
    render = partial(_render, tokenizer, tools, template_kwargs or {})
    prompt_ids = _encoded(tokenizer, render(prompt, True), add_special_tokens=False)["input_ids"]
    sequences: list[list[int]] = []
    masks: list[list[int] | None] = []
    for completion in completions:
        text = render(prompt + completion, False)
        repairs += _lost_reasoning(completion, text)
        several = [message["role"] for message in completion] != ["assistant"]
        try:
            encoded = _encoded(tokenizer, text, add_special_tokens=False, return_offsets_mapping=several)
        except NotImplementedError:
            raise InputError("completions of several messages need a fast tokenizer (tokenizer.json)") from None
        sequences.append(list(encoded["input_ids"]))
        masks.append(None)
        if several:
            spans = _written(render, tokenizer.eos_token, prompt, completion, text)
            masks[-1] = [int(any(a < e and s < b for s, e in spans)) for a, b in encoded["offset_mapping"]]
    return replace(_split(list(prompt_ids), sequences, masks), repairs=repairs)


def _lost_reasoning(completion: Sequence[Message], text: str) -> list[tuple[str, str]]:
    """The (repair, detail) of reasoning in a completion that is not in the rendered text."""
    thoughts = [m[key] for m in completion for key in REASONING_KEYS if isinstance(m.get(key), str) and m[key].strip()]
    lost = [thought for thought in thoughts if thought.strip() not in text]
    return [("reasoning left out by the chat template", f"{thought!r:.80}") for thought in lost]


def template_messages(
    tokenizer: Any, messages: Sequence[Message], *, before: Sequence[Message] = ()
) -> tuple[list[Message], list[tuple[str, str]]]:
    """Checked messages as the tokenizer's chat template needs them behind those `before`: the arguments of calls as
    objects or as JSON text, ids of nine characters where it fails without; and the (repair, detail) of ids replaced and
    of text beside calls that the template leaves out. Raises InputError for a template that would lose all calls
    without a word, and Unwritable for messages that this one would change: more than one call, arguments that are no
    JSON object."""
    if not any(functions_of(message) for message in [*before, *messages]):
        return list(messages), []
    style = call_style(tokenizer)
    repairs: list[tuple[str, str]] = []
    if style.ids:
        messages, repairs = _with_ids([*before, *messages])
        messages = messages[len(before) :]
    for message in messages:
        if functions_of(message):
            _check_calls(functions_of(message), style)
            if message["content"] and not style.beside_text:
                repairs.append(("text beside calls left out by the chat template", f"{message['content']!r:.80}"))
    return [message if style.objects else _with_text_arguments(message) for message in messages], repairs


def _check_calls(functions: list[dict[str, Any]], style: CallStyle) -> None:
    names = ", ".join(function["name"] for function in functions)
    if not style.objects and not style.texts:
        raise InputError(
            f"the chat template drops tool calls ({names}): use the template of a model that is made for tool calls"
        )
    if len(functions) > 1 and not style.several:
        raise Unwritable(f"the chat template cannot write more than one call in a message ({names})")
    for function in functions:
        if isinstance(function["arguments"], str) and not style.texts:
            raise Unwritable(
                f"the arguments of {function['name']!r} are no JSON object, and the chat template would not write them "
                f"as they are: {function['arguments']!r:.80}"
            )


def _with_ids(messages: Sequence[Message]) -> tuple[list[Message], list[tuple[str, str]]]:
    """Messages whose calls have ids of nine letters and digits, and tool results the ids of their calls; a result
    without one answers the first call that is not answered yet."""
    changed, repairs = [], []
    new_ids: dict[str, str] = {}
    waiting: list[str] = []
    number = 0
    for message in messages:
        if functions_of(message):
            calls, waiting = [], []
            for call in message["tool_calls"]:
                number += 1
                old = None if call.get("id") is None else str(call["id"])
                new = old if old and _ID.fullmatch(old) else f"call{number:05}"
                if old is not None:
                    new_ids[old] = new
                    if old != new:
                        repairs.append(("id of a call replaced by one that the chat template takes", old))
                waiting.append(new)
                calls.append({**call, "id": new})
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            new = new_ids.get(str(message.get("tool_call_id"))) or (waiting or [f"call{number:05}"])[0]
            waiting = [other for other in waiting if other != new]
            message = {**message, "tool_call_id": new}
        changed.append(message)
    return changed, repairs


def _with_text_arguments(message: Message) -> Message:
    calls = []
    for call, function in zip(message.get("tool_calls") or [], functions_of(message), strict=True):
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        written = {**function, "arguments": text}
        calls.append({**call, "function": written} if "function" in call else written)
    return {**message, "tool_calls": calls} if calls else message


def _render(
    tokenizer: Any, tools: list[dict[str, Any]], kwargs: dict[str, Any], messages: list[Message], open_turn: bool
) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=open_turn, **kwargs
        )
    except Exception as error:  # a template is a foreign program and may fail in any way
        roles = ", ".join(message["role"] for message in messages)
        problem = f"{type(error).__name__}: {error}"
        raise InputError(f"the chat template refuses the messages ({roles}): {problem}") from error


def _encoded(tokenizer: Any, text: str, **options: Any) -> Any:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = f"{text[max(0, error.start - 40) : error.start]!r}"
        raise InputError(f"the text holds half a character (a lone surrogate), behind {before}: remove it") from None
    return tokenizer(text, verbose=False, **options)


def _written(
    render: Callable[[list[Message], bool], str],
    eos: str | None,
    prompt: list[Message],
    completion: list[Message],
    text: str,
) -> list[Span]:
    """The characters of `text`, the rendered conversation, that the model wrote in the turns of the completion."""
    turns = [i for i, message in enumerate(completion) if message["role"] == "assistant"]
    if not turns:
        raise InputError("a completion needs a message of the assistant")
    spans = []
    for turn in turns:
        unstable = InputError(
            f"message {turn} of the completion cannot be told in the rendered conversation: the chat template changes "
            "it when later messages follow; use a template that keeps earlier turns as they are"
        )
        head = render(prompt + completion[:turn], True)
        start = shared_length(head, text)
        # Some templates open a turn differently than they write it (an empty thought). At the first turn that only
        # moves the end of the prompt; later it would leave unclear what the model wrote.
        if start < len(head if turn > 0 else render(prompt, False).rstrip()):
            raise unstable
        end = len(text)
        if turn < len(completion) - 1:
            closed = render(prompt + completion[: turn + 1], False).rstrip()
            if text.startswith(closed):
                end = len(closed)
            elif eos and closed.endswith(eos) and eos in text[start:]:
                # Qwen3 writes an empty thought into the last turn only; the end of the turn can still be told.
                end = text.index(eos, start) + len(eos)
            else:
                raise unstable
        spans.append((start, end))
    return spans


def _split(prompt: list[int], sequences: list[list[int]], masks: list[list[int] | None]) -> Rendered:
    length = min(shared_length(prompt, ids) for ids in sequences)
    if length == 0:
        raise InputError("the prompt is empty")
    if any(len(ids) == length for ids in sequences):
        raise InputError("a completion is empty")
    return Rendered(
        prompt_ids=prompt[:length],
        completions=[ids[length:] for ids in sequences],
        trained=[None if mask is None else mask[length:] for mask in masks],
        moved=len(prompt) - length,
    )
