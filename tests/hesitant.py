"""A model that knows one task and hesitates at one place, and the dialogue that it was trained on."""

from __future__ import annotations

import copy

import torch

from ttpa.data.decisions import decisions
from ttpa.data.dialogues import Dialogue

WEATHER = {
    "name": "weather",
    "description": "",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"type": "string", "enum": ["C", "F"]},
        },
        "required": ["city"],
    },
}
TIME = {"name": "time", "description": "", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": TIME}]


def calling(name, **arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def asking(id, city, *messages, **source):
    first = [{"role": "user", "content": f"Weather in {city}?"}]
    return Dialogue(id, TOOLS, [*first, *(messages or [calling("weather", city=city, days=2)])], source)


def train(model, tokenizer, examples, steps):
    """A copy of the model after some steps on (dialogue, weight) examples, each the first decision of its dialogue."""
    model = copy.deepcopy(model).train()
    rows = [(decisions(dialogue, tokenizer)[0], weight) for dialogue, weight in examples]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        for row, weight in rows:
            ids = torch.tensor([row.prompt_ids + row.gold_ids])
            labels = ids.clone()
            labels[0, : len(row.prompt_ids)] = -100
            (weight * model(input_ids=ids, labels=labels, use_cache=False).loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()
