"""`python -m ttpa.evaluate`: how many tool calls a model gets right.

    python -m ttpa.evaluate --model ORG/MODEL --data dialogues.jsonl --output runs/e
    python -m ttpa.evaluate --model ORG/MODEL --data bfcl_eval/data --output runs/b
    torchrun --nproc-per-node 8 -m ttpa.evaluate --model ORG/MODEL --data dialogues.jsonl --output runs/e

At every place of the dialogues at which the assistant calls tools, the model answers greedily after the gold messages
before it, and its answer is scored by the strict ESM. BFCL's single-turn questions, a file or a folder of them, are
judged by the rules of BFCL's checker. The run folder gets config.yaml (the options), data_report.json (what was read),
summary.json (the table and more, for machines) and outcomes.jsonl (score and errors of every decision or question).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ttpa.config import option, parse_config, run_command, save_config
from ttpa.data.benchmark import read_benchmark
from ttpa.data.jsonl import write_json_lines
from ttpa.data.read import kind_of, read_dialogues
from ttpa.errors import InputError
from ttpa.evaluation import evaluate_calls, evaluation_table
from ttpa.evaluation.benchmark import benchmark_table, evaluate_benchmark, group_means
from ttpa.evaluation.exam import shared
from ttpa.files import atomic_write
from ttpa.model import load_model, load_tokenizer
from ttpa.world import World, joined_world


@dataclass(frozen=True)
class EvaluateConfig:
    """The options of the command."""

    model: str = option(MISSING, "model folder or Hugging Face name")
    data: Path = option(MISSING, "dialogues, or BFCL questions: a file, or a folder with their possible answers")
    output: Path = option(MISSING, "folder that the results are written to")
    dialect: str | None = option(None, "how the model writes calls, as in mistral; none: as its template does")
    max_new_tokens: int = option(256, "longest answer in tokens")
    max_length: int | None = option(None, "leave out what has more tokens than this, gold answer included")
    decode_batch_size: int = option(64, "answers to decode side by side")
    bf16: bool = option(False, "weights in bfloat16; they are float32 otherwise")

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "decode_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, not {getattr(self, name)}")


def main(argv: Sequence[str]) -> None:
    """Run the command with its arguments; raises InputError for what the user has to change."""
    description = (
        "Let a model answer at every tool call of dialogues, or the questions of BFCL, and count the right answers and "
        "the errors."
    )
    config = parse_config(EvaluateConfig, argv, prog="python -m ttpa.evaluate", description=description)
    with joined_world() as world:
        evaluate(config, world)


def evaluate(config: EvaluateConfig, world: World) -> dict[str, Any]:
    """Evaluate a model, write the run folder, print the table, and return the content of summary.json; raises
    InputError for what the user has to change."""
    questions, dialogues = None, None
    if kind_of(config.data)[0] == "evaluation":
        questions, report = read_benchmark(config.data)
    else:
        dialogues, report = read_dialogues(config.data)
    tokenizer = load_tokenizer(config.model, dialect=config.dialect)
    model = load_model(config.model, dtype=torch.bfloat16 if config.bf16 else torch.float32)
    model.to(world.device)  # type: ignore[arg-type]  # transformers wraps it untyped

    began = time.perf_counter()
    limits: dict[str, Any] = {
        "batch_size": config.decode_batch_size,
        "max_new_tokens": config.max_new_tokens,
        "max_length": config.max_length,
    }
    if questions is not None:
        evaluation = shared(questions, partial(evaluate_benchmark, model, tokenizer, **limits), world=world)
    else:
        evaluation = shared(dialogues or [], partial(evaluate_calls, model, tokenizer, **limits), world=world)
    if not evaluation.outcomes:
        raise InputError("nothing was evaluated: no tool is called within --max_length", path=config.data)
    summary = {
        "model": config.model,
        "data": str(config.data),
        **evaluation.to_dict(),
        **({} if questions is None else {"benchmark": "bfcl", "groups": group_means(evaluation)}),
        "seconds": time.perf_counter() - began,
    }
    if world.main:
        save_config(config, config.output / "config.yaml")
        report.save(config.output / "data_report.json")
        write_json_lines(config.output / "outcomes.jsonl", (asdict(outcome) for outcome in evaluation.outcomes))
        with atomic_write(config.output / "summary.json") as file:
            file.write(json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
        print(evaluation_table(evaluation) if questions is None else benchmark_table(evaluation))
    return summary


if __name__ == "__main__":
    run_command(main)
