"""`python -m ttpa.evaluate`: how many tool calls a model gets right.

    python -m ttpa.evaluate --model ORG/MODEL --data dialogues.jsonl --output runs/e

At every place of the dialogues at which the assistant calls tools, the model answers greedily after the gold messages
before it, and its answer is scored by the strict ESM. The run folder gets config.yaml (the options), summary.json (the
table and more, for machines) and outcomes.jsonl (score and errors of every decision).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ttpa.config import option, parse_config, run_command, save_config
from ttpa.data.jsonl import write_json_lines
from ttpa.data.read import read_dialogues
from ttpa.errors import InputError
from ttpa.evaluation import evaluate_calls, evaluation_table
from ttpa.files import atomic_write
from ttpa.model import load_model, load_tokenizer


@dataclass(frozen=True)
class EvaluateConfig:
    """The options of the command."""

    model: str = option(MISSING, "model folder or Hugging Face name")
    data: Path = option(MISSING, "dialogues, one JSON object a line")
    output: Path = option(MISSING, "folder that the results are written to")
    max_new_tokens: int = option(256, "longest answer in tokens")
    max_length: int | None = option(None, "leave out decisions with more tokens than this, gold answer included")
    decode_batch_size: int = option(64, "answers to decode side by side")
    bf16: bool = option(False, "weights in bfloat16; they are float32 otherwise")

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "decode_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, not {getattr(self, name)}")


def main(argv: Sequence[str]) -> None:
    """Run the command with its arguments; raises InputError for what the user has to change."""
    description = "Let a model answer at every tool call of dialogues, and count the exact answers and the errors."
    evaluate(parse_config(EvaluateConfig, argv, prog="python -m ttpa.evaluate", description=description))


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a model, write the run folder, print the table, and return the content of summary.json; raises
    InputError for what the user has to change."""
    dialogues, _ = read_dialogues(config.data)
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, dtype=torch.bfloat16 if config.bf16 else torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]  # transformers wraps it untyped
    save_config(config, config.output / "config.yaml")

    began = time.perf_counter()
    evaluation = evaluate_calls(
        model,
        tokenizer,
        dialogues,
        batch_size=config.decode_batch_size,
        max_new_tokens=config.max_new_tokens,
        max_length=config.max_length,
    )
    if not evaluation.outcomes:
        raise InputError("no decision was evaluated: the dialogues call no tool within --max_length", path=config.data)
    summary = {
        "model": config.model,
        "data": str(config.data),
        **evaluation.to_dict(),
        "seconds": time.perf_counter() - began,
    }
    write_json_lines(config.output / "outcomes.jsonl", (asdict(outcome) for outcome in evaluation.outcomes))
    with atomic_write(config.output / "summary.json") as file:
        file.write(json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
    print(evaluation_table(evaluation))
    return summary


if __name__ == "__main__":
    run_command(main)
