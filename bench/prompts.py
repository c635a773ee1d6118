"""Prompts of a given length that the widened embedded model answers as well as short ones."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any, Literal, get_args

from ttpa.construct import construct_dialogues
from ttpa.data.decisions import Decision, decisions
from ttpa.data.dialogues import Dialogue

Workload = Literal["own", "shared"]
WORKLOADS: tuple[Workload, ...] = get_args(Workload)
TEXT = 480
"""Readable tokens of a prompt at most: beyond some 600 the embedded model no longer answers."""

SHARED_TOOLS = 12
AT_ONCE = 40  # dialogues constructed at once


def make_prompts(
    tokenizer: Any, num: int, *, length: int, workload: Workload, vocab_size: int, seed: int = 0
) -> list[Decision]:
    """`num` decisions of different dialogues of the built-in world, with prompts of `length` tokens.

    Workload `own`: a dialogue offers its own tools and further ones, as far as TEXT and `length` allow, and no two
    prompts begin alike. Workload `shared`: all offer the same SHARED_TOOLS tools. Every prompt is filled up in front
    with blanks of `bench.widened`, the token ids from the size of the tokenizer to `vocab_size`; under `shared` with
    the same ones, so that prompts have up to `length` tokens.
    """
    rng, most = random.Random(seed), min(TEXT, length)
    world = {tool["function"]["name"]: tool for dialogue in next(_dialogues(seed)) for tool in dialogue.tools}
    common = rng.sample(sorted(world), SHARED_TOOLS)
    found: list[Decision] = []
    for dialogue in (dialogue for some in _dialogues(seed) for dialogue in some):
        if workload == "own":
            offered = _with_further_tools(tokenizer, dialogue, list(world.values()), most, rng)
        elif _called(dialogue) <= set(common):
            offered = dataclasses.replace(dialogue, tools=[world[name] for name in common])
        else:
            continue
        decision = _one_decision(tokenizer, offered, len(found))
        if len(decision.prompt_ids) <= most:
            found.append(decision)
        if len(found) == num:
            break
    blanks = range(len(tokenizer), vocab_size)
    longest = max(len(decision.prompt_ids) for decision in found)
    same = rng.choices(blanks, k=length - longest)
    filled = []
    for number, decision in enumerate(found):
        different = [blanks[number], *rng.choices(blanks, k=length)]
        front = same if workload == "shared" else different[: length - len(decision.prompt_ids)]
        filled.append(dataclasses.replace(decision, prompt_ids=front + decision.prompt_ids))
    return filled


def _dialogues(seed: int) -> Iterator[list[Dialogue]]:
    """Endless batches."""
    while True:
        yield construct_dialogues(AT_ONCE, split="preference", seed=seed)
        seed += 1


def _called(dialogue: Dialogue) -> set[str]:
    return {call["function"]["name"] for message in dialogue.messages for call in message.get("tool_calls", [])}


def _one_decision(tokenizer: Any, dialogue: Dialogue, number: int) -> Decision:
    """The first decision of one dialogue, the second of the next, and so on."""
    found = decisions(dialogue, tokenizer)
    return found[number % len(found)]


def _with_further_tools(
    tokenizer: Any, dialogue: Dialogue, world: list[dict[str, Any]], most: int, rng: random.Random
) -> Dialogue:
    """The dialogue with as many more tools, in any order, as leave its longest prompt `most` tokens."""
    known = {tool["function"]["name"] for tool in dialogue.tools}
    for tool in rng.sample(world, len(world)):
        if tool["function"]["name"] not in known:
            more = dataclasses.replace(dialogue, tools=[*dialogue.tools, tool])
            if len(decisions(more, tokenizer)[-1].prompt_ids) > most:
                break
            dialogue = more
    return dataclasses.replace(dialogue, tools=rng.sample(dialogue.tools, len(dialogue.tools)))
