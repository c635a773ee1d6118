"""One training step of TRL's DPOTrainer and one of ttpa, side by side on the same pairs and the same model.

    python bench/train_step.py [--case NAME] [--rounds N] [--threads N] [--json FILE]

Both sides run in one process and take turns; the pairs per second are those of the median step. A step is: forward
of the policy and of the reference model, loss, backward, AdamW, with metrics and without gradient checkpointing.
Peak memory is that of a fresh process for each side: the highest resident set over three steps minus the resident
set after the imports, so it holds weights, reference, gradients, optimizer states and activations. Completions of one
prompt differ from their first token on: only the prompt is shared.

Beside other work use `--threads 1`: two threads that wait for each other and for a third party measure the third party.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ttpa.losses import pair_metrics, token_dpo_loss
from ttpa.model import packed_logps, use_tree_attention
from ttpa.trees.pack import pack_trees
from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions

VOCABULARY = 4096


@dataclass
class Case:
    """`trees` prompts a step, each with one chosen and `rejected` rejected completions."""

    trees: int
    prompt: int
    completion: int
    rejected: int
    faster: float  # what we hold ourselves to: times the pairs per second of TRL
    memory: float | None = None  # and at most this share of its memory


CASES = {
    "tree-512-48-1:4": Case(trees=2, prompt=512, completion=48, rejected=4, faster=7.0, memory=0.45),
    "pair-1024-64-1:1": Case(trees=4, prompt=1024, completion=64, rejected=1, faster=2.3),
}


def make_trees(case: Case) -> list[PreferenceTree]:
    """Random tokens; the first token of a completion is its number, so that all differ from there."""
    generator = torch.Generator().manual_seed(0)
    trees = []
    for t in range(case.trees):
        ids = torch.randint(16, VOCABULARY, (1 + case.rejected, case.completion), generator=generator)
        ids[:, 0] = torch.arange(1 + case.rejected)
        prompt = torch.randint(16, VOCABULARY, (case.prompt,), generator=generator).tolist()
        completions = [Completion(row, Leaf(0, "given")) for row in ids.tolist()]
        nodes, leaves = merge_completions(completions)
        pairs = [Pair(0, 1 + r) for r in range(case.rejected)]
        trees.append(PreferenceTree(f"tree{t}", prompt, nodes, leaves, pairs))
    return trees


def make_models() -> tuple[Qwen3ForCausalLM, Qwen3ForCausalLM]:
    """Policy and reference, not equal."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    policy, reference = Qwen3ForCausalLM(config), Qwen3ForCausalLM(config)
    return policy, reference.requires_grad_(False).eval()


def trl_step(case: Case) -> Callable[[], float]:
    """TRL's training step on the pairs as rows, collated by its own collator (its dataset of text is a placeholder)."""
    rows = [
        {
            "prompt_ids": tree.prompt_ids,
            "chosen_ids": tree.completion_ids(pair.chosen),
            "rejected_ids": tree.completion_ids(pair.rejected),
        }
        for tree in make_trees(case)
        for pair in tree.pairs
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<pad>",
    )
    policy, reference = make_models()
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=len(rows),
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            learning_rate=1e-6,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator(rows)
    policy.train()
    trainer.current_gradient_accumulation_steps = 1  # its training loop sets this
    optimizer = trainer.create_optimizer()

    def step() -> float:
        loss = trainer.training_step(policy, batch)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def ttpa_step(case: Case) -> Callable[[], float]:
    """The same step over packed trees."""
    policy, reference = (use_tree_attention(model) for model in make_models())
    batch = pack_trees(make_trees(case))
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def step() -> float:
        with torch.no_grad():
            ref_logp_R = packed_logps(reference, batch)
        logp_R = packed_logps(policy, batch)
        trained = slice(0, batch.num_trained)
        loss, _ = token_dpo_loss(logp_R=logp_R[trained], ref_logp_R=ref_logp_R[trained], C=batch.C)
        loss.backward()
        pair_metrics(logp_R=logp_R, ref_logp_R=ref_logp_R, chosen_PR=batch.chosen_PR, rejected_PR=batch.rejected_PR)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


SIDES = {"trl": trl_step, "ttpa": ttpa_step}


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_bytes(side: str, case: Case) -> int:
    """Highest resident set of three steps above the one after the imports; to be called in a fresh process."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    step = SIDES[side](case)
    for _ in range(3):
        step()
    return _resident("VmHWM") - before


def measure(name: str, case: Case, *, rounds: int, threads: int) -> dict[str, object]:
    """Time both sides in turns, then their memory in two fresh processes."""
    steps = {side: make(case) for side, make in SIDES.items()}
    losses = {side: step() for side, step in steps.items()}
    if abs(losses["trl"] - losses["ttpa"]) > 1e-5 * abs(losses["trl"]):
        raise RuntimeError(f"the sides disagree about the loss of the first step: {losses}")
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[side].append(time.perf_counter() - start)
    pairs = case.trees * case.rejected
    rate = {side: pairs / statistics.median(values) for side, values in seconds.items()}
    memory = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--case", name, "--threads", str(threads), "--peak", side]
        memory[side] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return {
        "case": name,
        "pairs_per_step": pairs,
        "pairs_per_second": rate,
        "seconds": seconds,
        "peak_bytes": memory,
        "faster": rate["ttpa"] / rate["trl"],
        "memory": memory["ttpa"] / memory["trl"],
        "loss": losses,
    }


def main() -> None:
    """Measure the chosen cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="one case instead of all")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bars()
    if options.peak:
        print(peak_bytes(options.peak, CASES[options.case]))
        return
    results = []
    print(
        f"{'case':18} {'TRL pairs/s':>12} {'ttpa pairs/s':>13} {'ratio':>12} {'TRL GB':>8} {'ttpa GB':>8} {'ratio':>14}"
    )
    for name in [options.case] if options.case else CASES:
        case = CASES[name]
        result = measure(name, case, rounds=options.rounds, threads=options.threads)
        rate, memory = result["pairs_per_second"], result["peak_bytes"]
        assert isinstance(rate, dict) and isinstance(memory, dict)
        print(
            f"{name:18} {rate['trl']:12.2f} {rate['ttpa']:13.2f} {result['faster']:6.2f} (>={case.faster:.1f})"
            f" {memory['trl'] / 1e9:8.2f} {memory['ttpa'] / 1e9:8.2f} {result['memory']:6.2f}"
            + (f" (<={case.memory:.2f})" if case.memory else "")
        )
        results.append(result)
    if options.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
        options.json.write_text(json.dumps({"versions": versions, "threads": options.threads, "cases": results}))


if __name__ == "__main__":
    main()
