"""Dialogues by reversed construction, without a language model: calls first, executed for real, the question last."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any, Literal

from ttpa.construct.recipes import SEEN, UNSEEN, UNSEEN_TOOLS, Recipe, Unusable
from ttpa.construct.values import Values
from ttpa.data.dialogues import Dialogue
from ttpa.tools.call import message_with_calls
from ttpa.tools.toolbox import Toolbox

Split = Literal["sft", "preference", "heldout", "unseen_phrasings", "unseen_tools"]
SPLITS: tuple[Split, ...] = ("sft", "preference", "heldout", "unseen_phrasings", "unseen_tools")


def construct_dialogues(num: int, *, split: Split, seed: int = 0) -> list[Dialogue]:
    """Make `num` dialogues of the built-in world; the same arguments give the same dialogues.

    The splits share no dialogue: every dialogue falls by a hash of its calls into one of two halves, of which `sft`
    has one and `preference` the other, whatever the seeds. The other three draw names, titles, cities, products,
    texts and dates that these two never show, and offer sets of tools that these two never offer;
    `unseen_phrasings` also asks in other words, `unseen_tools` asks for tools that no other split offers.
    """
    dialogues: list[Dialogue] = []
    attempt = 0
    known: set[str] = set()
    while len(dialogues) < num:
        rng = random.Random(f"{split}/{seed}/{attempt}")
        attempt += 1
        try:
            dialogue = _construct(rng, split, f"{split}-{seed}-{attempt}")
        except Unusable:
            continue
        signature = _signature(dialogue)
        half = int(signature[:8], 16) % 2
        if signature in known or (split == "sft" and half) or (split == "preference" and not half):
            continue
        if (_hash(sorted(tool["function"]["name"] for tool in dialogue.tools)) % 5 == 0) != _tests(split):
            continue
        known.add(signature)
        dialogues.append(dialogue)
    return dialogues


def _tests(split: Split) -> bool:
    return split not in ("sft", "preference")


def _hash(value: Any) -> int:
    return int(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8], 16)


def _signature(dialogue: Dialogue) -> str:
    calls = [message["tool_calls"] for message in dialogue.messages if message.get("tool_calls")]
    return hashlib.sha256(json.dumps(calls, sort_keys=True).encode()).hexdigest()


def _construct(rng: random.Random, split: Split, id: str) -> Dialogue:
    values = Values(rng, fresh=_tests(split), new_words=split == "unseen_phrasings")
    box = Toolbox(
        seed=rng.getrandbits(32),
        people=values.people(8),
        titles=values.titles,
        cities=values.cities,
        products=values.products,
        days=values.days,
    )
    recipes: list[Recipe] = (
        [rng.choice(UNSEEN)] if split == "unseen_tools" else rng.sample(SEEN, rng.choice((1, 1, 1, 2)))
    )
    messages: list[dict[str, Any]] = []
    used: list[str] = []
    for recipe in recipes:
        turns: list[dict[str, Any]] = []
        steps = recipe(values, box)
        calls = next(steps)
        while True:
            results = [box.execute(call) for call in calls]
            used += [call.name for call in calls]
            turns.append(message_with_calls(calls))
            turns += [{"role": "tool", "content": json.dumps(result)} for result in results]
            try:
                calls = steps.send(results)
            except StopIteration as end:
                question, answer = end.value
                break
        messages += [{"role": "user", "content": question}, *turns, {"role": "assistant", "content": answer}]
    return Dialogue(id, _offered(rng, box, used, split), messages, {"split": split, "generator": "rules"})


def _offered(rng: random.Random, box: Toolbox, used: list[str], split: Split) -> list[dict[str, Any]]:
    """The tools that the calls need and two or three that they do not, in any order."""
    needed = list(dict.fromkeys(used))
    others = [name for name in box.by_name if name not in needed and name not in UNSEEN_TOOLS]
    offered = needed + rng.sample(others, rng.randint(2, 3))
    rng.shuffle(offered)
    return [box.by_name[name].schema for name in offered]
