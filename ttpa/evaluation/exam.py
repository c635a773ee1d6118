"""The evaluation of a training run: the same dialogues before and after, each set apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from transformers import PreTrainedModel

from ttpa.data.dialogues import Dialogue
from ttpa.errors import InputError
from ttpa.evaluation.calls import Evaluation, Outcome, evaluate_calls
from ttpa.evaluation.compare import compare
from ttpa.world import World

Evaluations = dict[str, Evaluation]
Item = TypeVar("Item")


def take_exam(
    sets: Mapping[str, list[Dialogue]],
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    batch_size: int,
    max_new_tokens: int,
    max_length: int | None,
    world: World,
) -> Evaluations:
    """Evaluate a model on each set of dialogues, as `evaluate_calls` does; the processes share the work. Raises
    InputError for a set in which no tool is called."""
    evaluate = partial(
        evaluate_calls,
        model,
        tokenizer,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
    )
    found = {name: shared(dialogues, evaluate, world=world) for name, dialogues in sets.items()}
    for name, evaluation in found.items():
        if not evaluation.outcomes:
            raise InputError(f"--eval_data: {name} has no tool call to evaluate (left out: {evaluation.dropped})")
    return found


def shared(items: Sequence[Item], evaluate: Callable[[Sequence[Item]], Evaluation], *, world: World) -> Evaluation:
    """The evaluation of all items in every process: each process evaluates a run of them, and what they found is
    brought together in the order of the items."""
    first, last = (len(items) * rank // world.size for rank in (world.rank, world.rank + 1))
    part = evaluate(items[first:last])
    parts = [load(text)["part"] for text in world.gather_texts(dump({"part": part}))]
    outcomes = [outcome for evaluation in parts for outcome in evaluation.outcomes]
    return Evaluation(outcomes, {id: why for evaluation in parts for id, why in evaluation.dropped.items()})


def dump(evaluations: Evaluations) -> str:
    """Evaluations as JSON text."""
    return json.dumps({name: asdict(evaluation) for name, evaluation in evaluations.items()})


def load(text: str) -> Evaluations:
    """The inverse of `dump`."""
    return {
        name: Evaluation([Outcome(**outcome) for outcome in record["outcomes"]], record["dropped"])
        for name, record in json.loads(text).items()
    }


def results(before: Evaluations, after: Evaluations) -> dict[str, Any]:
    """What summary.json says of the evaluation: the first set on top (shares in [0, 1], the 95 % interval of their
    difference), all sets in full below."""
    if not before:
        return {"exact_calls": None, "esm_score": None, "errors": None, "evaluations": {}}
    full = {
        name: {
            "before": before[name].to_dict(),
            "after": after[name].to_dict(),
            "difference": compare(before[name], after[name]).to_dict(),
        }
        for name in before
    }
    main = next(iter(full.values()))
    sides = {side: main[side] for side in ("before", "after")}
    interval = [points / 100 for points in main["difference"]["interval"]]
    return {
        "exact_calls": {**{side: part["exact_share"] for side, part in sides.items()}, "interval": interval},
        "esm_score": {side: part["esm_score"] for side, part in sides.items()},
        "errors": {side: part["errors"] for side, part in sides.items()},
        "evaluations": full,
    }
