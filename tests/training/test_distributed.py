"""Two processes on the CPU against one: what they log and the weights that they leave behind."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from random_trees import random_tree
from ranks import run_ranks
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ttpa.construct import construct_dialogues
from ttpa.data.dialogues import write_dialogues
from ttpa.train import main
from ttpa.training import loop
from ttpa.training.monitor import repeatable
from ttpa.training.stop import STOPPED
from ttpa.trees.io import read_trees, write_trees

LORA = ("--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj,up_proj,lm_head")


@dataclass
class Case:
    """Options of a run, and whether its trees are of one size."""

    options: tuple[str, ...] = ()
    even: bool = False


CASES = {
    "full": Case(("--loss_type", "ttpa,sft", "--loss_weights", "1,2")),
    "even trees, one pack a step": Case(even=True),
    "several packs a step": Case(("--pack_tokens", "60")),
    "lora with the head": Case(LORA),
    "replicated": Case(("--shard_size", "1", "--pack_tokens", "60")),
    "moving reference": Case(("--sync_ref_model", "--ref_model_sync_steps", "2")),
    "divergence": Case(("--loss_type", "tdpo2")),
    "checkpointing": Case(("--activation_checkpointing", "full", "--loss_type", "ipo")),
}


def command(folder: Path, name: str, *options: str, case: Case) -> list[str]:
    trees = folder / ("even.jsonl" if case.even else "trees.jsonl")
    return [
        *("--model", str(folder / "model"), "--data", str(trees), "--output", str(folder / name)),
        *("--learning_rate", "1e-3", "--batch_size", "12", "--max_steps", "5", "--logging_steps", "1"),
        *("--max_grad_norm", "0.5", "--save_steps", "2", *case.options, *options),
    ]


def train(*commands: list[str]) -> None:
    for argv in commands:
        main(argv)


def lines_of(folder: Path) -> list[dict]:
    """What the log holds that does not depend on the machine or on how packs are laid out."""
    lines = [repeatable(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("waste", "free")} for line in lines]


def weights_of(folder: Path) -> torch.Tensor:
    state = AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()
    return torch.cat([state[name].flatten() for name in sorted(state)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("distributed")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=20,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,  # nothing here is even
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_trees(folder / "trees.jsonl", [random_tree(seed, tools=seed % 2 == 0) for seed in range(13)])
    write_trees(folder / "even.jsonl", [random_tree(seed) for seed in (3, 3, 3, 3, 3, 3)])
    return folder


def test_two_processes_train_as_one(folder):
    run_ranks(train, 2, *(command(folder, f"{name} 2", case=case) for name, case in CASES.items()))
    start = weights_of_start(folder)
    for name, case in CASES.items():
        train(command(folder, f"{name} 1", case=case))
        one, two = (weights_of(folder / f"{name} {size}") for size in (1, 2))
        assert (one[: len(start)] - start).abs().max() > 1e-4 or case.options == LORA
        assert (one - two).abs().max() < 1e-6, name
        for line, other in zip(lines_of(folder / f"{name} 1"), lines_of(folder / f"{name} 2"), strict=True):
            assert other == pytest.approx(line, rel=2e-4, abs=2e-6), name


def weights_of_start(folder: Path) -> torch.Tensor:
    state = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    return torch.cat([state[name].flatten() for name in sorted(state)])


def test_a_run_goes_on_with_another_number_of_processes(folder):
    case = Case(("--loss_type", "ttpa,sft"))
    train(command(folder, "whole", case=case))
    run_ranks(stop_after, 2, command(folder, "parts", case=case), 2)
    stop_after(command(folder, "parts", "--resume", "auto", case=case), 2)
    run_ranks(train, 2, command(folder, "parts", "--resume", "auto", case=case))
    assert (weights_of(folder / "whole") - weights_of(folder / "parts")).abs().max() < 1e-6
    for line, other in zip(lines_of(folder / "whole"), lines_of(folder / "parts"), strict=True):
        assert other == pytest.approx(line, rel=2e-4, abs=2e-6)


def test_two_processes_sample_evaluate_and_train_as_one(folder):
    write_dialogues(folder / "eval.jsonl", construct_dialogues(3, split="heldout", seed=3))

    def sampling(name: str) -> list[str]:
        return [
            *(
                "--model",
                str(folder / "model"),
                "--output",
                str(folder / name),
                "--eval_data",
                str(folder / "eval.jsonl"),
            ),
            *("--num_dialogues", "5", "--rounds", "2", "--max_new_tokens", "4", "--learning_rate", "1e-4"),
            *("--logging_steps", "1"),
        ]

    run_ranks(train, 2, sampling("sampled 2"))
    train(sampling("sampled 1"))
    one, two = (
        [tree.to_dict() for tree in read_trees(folder / name / "trees.jsonl")] for name in ("sampled 1", "sampled 2")
    )
    assert [tree["id"] for tree in one] == [tree["id"] for tree in two] and len(one) > 4
    assert [[node["ids"] for node in tree["nodes"]] for tree in one] == [
        [node["ids"] for node in tree["nodes"]] for tree in two
    ]
    assert (weights_of(folder / "sampled 1") - weights_of(folder / "sampled 2")).abs().max() < 1e-6
    alone, both = (json.loads((folder / name / "summary.json").read_text()) for name in ("sampled 1", "sampled 2"))
    assert alone["evaluations"] == both["evaluations"] and (alone["processes"], both["processes"]) == (1, 2)


def stop_after(argv: list[str], steps: int) -> None:
    """Train, and be told to stop in one process once this number of steps is under way."""
    taken, clip = [], loop.clip

    def tell(*given: Any) -> float:
        taken.append(None)
        if len(taken) == steps and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*given)

    loop.clip = tell
    try:
        with pytest.raises(SystemExit) as exit:
            main(argv)
    finally:
        loop.clip = clip
    assert exit.value.code == STOPPED and len(taken) == steps
