"""The training step of TRL's DPOTrainer and that of ttpa on the same pairs, models and optimizer."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ttpa.losses import LossOptions, LossTerm
from ttpa.model import use_tree_attention
from ttpa.training.checkpoint import Checkpoints
from ttpa.training.config import TrainConfig
from ttpa.training.examples import Example
from ttpa.training.flops import ModelShape, pack_flops, size_of_trees
from ttpa.training.loop import Round, Run, accumulate, clip, lay_out
from ttpa.training.lora import LoraOptions, add_lora
from ttpa.training.monitor import Monitor
from ttpa.training.objective import Objective
from ttpa.training.optimizer import make_optimizer
from ttpa.training.policy import Policy
from ttpa.training.reference import fill, logps_of
from ttpa.training.reference_cache import ReferenceCache
from ttpa.training.run_folder import RunFolder
from ttpa.training.stop import StopSignal
from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions
from ttpa.world import World

BETA, LEARNING_RATE, LORA_RANK, LORA_ALPHA = 0.1, 1e-4, 16, 32


@dataclass(frozen=True)
class Case:
    """`trees` prompts a step, each with one chosen and `rejected` rejected completions, for a model of a config.

    `micro` is the number of pairs that TRL computes at a time, and `parts` a smaller one that is measured as well;
    `pack_tokens` is the number of tokens that ttpa does. `bf16` and `lora` are those of both. Weights are fp32, under
    LoRA with bf16 the frozen ones are bf16.
    """

    config: PreTrainedConfig
    trees: int
    prompt: int
    completion: int
    rejected: int
    faster: float  # what we hold ourselves to: times the pairs per second of TRL
    memory: float  # and at most this share of its memory
    micro: int
    parts: int | None = None
    pack_tokens: int = 4096
    bf16: bool = False
    lora: bool = False

    @property
    def pairs(self) -> int:
        return self.trees * self.rejected


@dataclass
class Side:
    """One training step, which returns its loss; `logged` is a step of which one in ten is, with more metrics; the
    reference pass over the pairs of one step, if there is one. `flops` are those of a step, where they are known."""

    step: Callable[[], float]
    logged: Callable[[], float] | None = None
    reference: Callable[[], None] | None = None
    flops: int | None = None


def make_trees(case: Case) -> list[PreferenceTree]:
    """Random tokens; the first token of a completion is its number, so that all differ from there."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = case.config.vocab_size
    trees = []
    for t in range(case.trees):
        ids = torch.randint(16, vocabulary, (1 + case.rejected, case.completion), generator=generator)
        ids[:, 0] = torch.arange(1 + case.rejected)
        prompt = torch.randint(16, vocabulary, (case.prompt,), generator=generator).tolist()
        nodes, leaves = merge_completions(Completion(row, Leaf(0, "given")) for row in ids.tolist())
        pairs = [Pair(0, 1 + r) for r in range(case.rejected)]
        trees.append(PreferenceTree(f"tree{t}", prompt, nodes, leaves, pairs))
    return trees


def make_model(case: Case, device: torch.device) -> PreTrainedModel:
    """Random weights, made where they are used and the same each time."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.lora and case.bf16 else torch.float32
    config = copy.deepcopy(case.config)  # TRL writes its padding token there
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def trl_side(case: Case, device: torch.device, *, cached: bool, checkpointing: bool = False) -> Side:
    """TRL's training step on the pairs as rows, `case.micro` at a time, collated by its own collator; `cached` is
    `precompute_ref_log_probs`. Its dataset of text is a placeholder."""
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
    online = not cached and not case.lora
    trainer = trl.DPOTrainer(
        model=make_model(case, device),
        ref_model=make_model(case, device).requires_grad_(False).eval() if online else None,
        args=trl.DPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=case.micro,
            max_length=None,
            activation_checkpointing=checkpointing,
            bf16=case.bf16,
            use_cpu=device.type == "cpu",
            report_to="none",
            disable_tqdm=True,
            beta=BETA,
            learning_rate=LEARNING_RATE,
            precompute_ref_log_probs=cached,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
        peft_config=_peft_config() if case.lora else None,
    )
    # What its training loop does before the first step.
    batches = [trainer.data_collator(rows[i : i + case.micro]) for i in range(0, len(rows), case.micro)]
    trainer.current_gradient_accumulation_steps = len(batches)
    model = trainer.accelerator.prepare_model(trainer.model)
    model.train()
    optimizer = trainer.create_optimizer()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def reference() -> None:
        for i, batch in enumerate(batches):
            logps = trainer.compute_ref_log_probs(trainer.model, trainer._prepare_inputs(batch))
            batches[i] = {**batch, **dict(zip(("ref_chosen_logps", "ref_rejected_logps"), logps, strict=True))}

    def step() -> float:
        loss = sum(trainer.training_step(model, dict(batch)) for batch in batches)
        trainer.accelerator.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return Side(step, reference=reference if cached else None)


def _peft_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def ttpa_side(case: Case, device: torch.device) -> Side:
    """The step of `ttpa.training.loop` over packed trees, from laying out the packs to the optimizer, with the cached
    reference; `logged` is the one in `logging_steps` that computes the metrics of whole completions as well."""
    folder = Path(tempfile.mkdtemp(prefix="ttpa-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = TrainConfig(
        model="-",
        output=folder,
        loss_type="sigmoid",
        beta=BETA,
        learning_rate=LEARNING_RATE,
        pack_tokens=case.pack_tokens,
        bf16=case.bf16,
    )
    world = World(device=device)
    model = use_tree_attention(make_model(case, device))
    if case.lora:
        add_lora(model.requires_grad_(False), LoraOptions(r=LORA_RANK, alpha=LORA_ALPHA))
    policy = Policy(model, bf16=case.bf16)
    optimizer = make_optimizer(model, config=config)
    run = Run(
        config,
        world,
        Objective((LossTerm("sigmoid", 1.0),), LossOptions(beta=BETA)),
        Monitor(RunFolder(config.output), logging_steps=config.logging_steps, world=world),
        Checkpoints(config.output, world=world, fingerprint={}),
        StopSignal(),
    )
    trees, shape = make_trees(case), ModelShape.of(model)
    weights = [[(tree.trained(pair.chosen), tree.trained(pair.rejected)) for pair in tree.pairs] for tree in trees]
    examples = [Example(tree, [weights_of_tree]) for tree, weights_of_tree in zip(trees, weights, strict=True)]
    policy.train()

    def reference() -> None:
        cache = ReferenceCache(Path(tempfile.mkdtemp(dir=folder)), model_key="random")
        fill(
            cache,
            trees,
            compute=lambda pack: policy.logps(pack.to(device)),
            pack_tokens=case.pack_tokens,
            world=world,
        )
        examples[:] = [replace(example, logps=logps_of(example.tree, cache)) for example in examples]

    def step(*, report: bool = False) -> float:
        plan = lay_out(examples, shape, run)
        metrics, _ = accumulate(policy, plan, Round(1, examples), run, shape=shape, report=report)
        clip(policy, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return metrics["loss"]

    return Side(step, partial(step, report=True), reference, pack_flops(shape, size_of_trees(trees)))


def sides_of(case: Case) -> dict[str, Callable[[torch.device], Side]]:
    """How each side of a case is made on a device."""
    sides = {"trl": partial(trl_side, case, cached=False), "trl-cached": partial(trl_side, case, cached=True)}
    if case.parts:
        sides[f"trl-cached by {case.parts}"] = partial(trl_side, replace(case, micro=case.parts), cached=True)
    return {**sides, "ttpa": partial(ttpa_side, case)}


def synchronized(device: torch.device) -> float:
    """The time, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
