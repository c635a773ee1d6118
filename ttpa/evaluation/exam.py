"""The evaluation of a training run: the same dialogues before and after, each set apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from ttpa.data.dialogues import Dialogue
from ttpa.errors import InputError
from ttpa.evaluation.calls import Evaluation, Outcome, evaluate_calls
from ttpa.evaluation.compare import compare

Evaluations = dict[str, Evaluation]


def take_exam(
    sets: Mapping[str, list[Dialogue]],
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    batch_size: int,
    max_new_tokens: int,
    max_length: int | None,
    rank: int = 0,
    size: int = 1,
    gather: Callable[[str], list[str]] = lambda text: [text],
) -> Evaluations:
    """Evaluate a model on each set of dialogues, as `evaluate_calls` does; of `size` processes each takes a run of them
    and `gather` brings the texts of all together. Raises InputError for a set in which no tool is called."""
    found: Evaluations = {}
    for name, dialogues in sets.items():
        first, last = (len(dialogues) * r // size for r in (rank, rank + 1))
        part = evaluate_calls(
            model,
            tokenizer,
            dialogues[first:last],
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
        )
        parts = [evaluation for text in gather(dump({name: part})) for evaluation in load(text).values()]
        outcomes = [outcome for evaluation in parts for outcome in evaluation.outcomes]
        dropped = {id: why for evaluation in parts for id, why in evaluation.dropped.items()}
        if not outcomes:
            raise InputError(f"--eval_data: {name} has no tool call to evaluate (left out: {dropped})")
        found[name] = Evaluation(outcomes, dropped)
    return found


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
