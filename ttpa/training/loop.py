"""One round of training: the optimizer steps over a fixed set of trees."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ttpa.errors import InputError
from ttpa.esm.weights import WeightOptions
from ttpa.training.batches import Example, likelihood_examples, packs, plan_steps, preference_examples
from ttpa.training.config import TrainConfig
from ttpa.training.objective import backward
from ttpa.training.optimizer import learning_rate, make_optimizer
from ttpa.trees.record import PreferenceTree

Metrics = dict[str, float]


def train_round(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trees: Sequence[PreferenceTree],
    *,
    config: TrainConfig,
    log: Callable[[Metrics], None],
    seed: int,
) -> dict[str, int]:
    """Train a policy in place on the pairs of trees and return the number of its steps, pairs and packed tokens.

    The reference model is a frozen copy of the policy as it comes in; optimizer and learning rate start anew. `log`
    receives TRL's metrics at the first step, at every `logging_steps`-th and at the last, means over the steps since
    the time before. Raises InputError when a gradient is not finite, and when the first loss of sigmoid DPO is not
    ln 2, which is what two equal models give.
    """
    trees = [tree for tree in trees if tree.pairs]
    if config.loss_type == "sft":
        reference, examples = None, likelihood_examples(trees)
    else:
        weights = WeightOptions(error=config.error_weight, follow=config.follow_weight)
        examples = preference_examples(trees, tokenizer=tokenizer, options=weights)
        reference = copy.deepcopy(policy).requires_grad_(False).eval()
    steps = plan_steps(
        [len(tree.pairs) for tree in trees],
        batch_size=config.batch_size,
        num_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        seed=seed,
    )
    optimizer = make_optimizer(policy, config=config)
    total = {"steps": 0, "pairs": 0, "tokens": 0}
    window: list[Metrics] = []  # what was measured since the last line of the log
    window_start, window_tokens = time.perf_counter(), 0
    policy.train()
    progress = tqdm(steps, desc="training", unit="step", disable=None)
    for epoch, batch in progress:
        rate = learning_rate(total["steps"], total=len(steps), config=config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        metrics, tokens = gradient(policy, reference, [examples[i] for i in batch], config=config)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm or math.inf).item()
        total["steps"] += 1
        total["pairs"] += sum(len(trees[i].pairs) for i in batch)
        total["tokens"] += tokens
        _check(total["steps"], metrics, norm, config)
        optimizer.step()
        optimizer.zero_grad()
        window.append({**metrics, "grad_norm": norm})
        progress.set_postfix(loss=f"{metrics['loss']:.4f}")
        if total["steps"] in (1, len(steps)) or total["steps"] % config.logging_steps == 0:
            means = {name: math.fsum(m[name] for m in window) / len(window) for name in window[0]}
            now = time.perf_counter()
            speed = (total["tokens"] - window_tokens) / (now - window_start)
            place = {"epoch": epoch, "step": total["steps"], "num_tokens": total["tokens"], "tokens/s": speed}
            log({**means, "learning_rate": rate, **place})
            window, window_start, window_tokens = [], now, total["tokens"]
    policy.eval()
    return total


def gradient(
    policy: PreTrainedModel, reference: PreTrainedModel | None, examples: Sequence[Example], *, config: TrainConfig
) -> tuple[Metrics, int]:
    """Add the gradient of one optimizer step to the policy's, pack by pack, and return its metrics and the number of
    packed tokens. The loss is the mean over the pairs of the step, or over its chosen tokens for `sft`, and does not
    depend on `pack_tokens`."""
    sft = config.loss_type == "sft"
    cut = packs(
        examples,
        pack_tokens=config.pack_tokens,
        average=config.loss_type == "ipo",
        train_chosen=not sft and config.sft_weight > 0,
    )
    denominator = sum(pack.chosen_PR._nnz() if sft else len(pack.pairs) for pack in cut)
    chosen = 0 if sft else sum(len(pack.chosen_rows) for pack in cut)
    parts = [
        backward(policy, reference, pack, config=config, denominator=denominator, num_chosen_rows=chosen)
        for pack in cut
    ]
    metrics = {name: math.fsum(part[name] for part in parts) for name in parts[0]}
    return metrics, sum(len(pack.ids_T) for pack in cut)


def _check(step: int, metrics: Metrics, norm: float, config: TrainConfig) -> None:
    loss = metrics["loss"]
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise InputError(
            f"step {step}: the loss is {loss} and the gradient's norm {norm}; try a lower --learning_rate, and "
            "--bf16 false if it is on"
        )
    loss = metrics.get("loss/preference", loss)
    if step == 1 and config.loss_type == "sigmoid" and abs(loss - math.log(2)) > 1e-5:
        raise InputError(
            f"the first loss is {loss:.7f} and not ln 2 = {math.log(2):.7f}, so policy and reference differ before any "
            "step was taken: the model does not compute the same twice, and its margins cannot be trusted"
        )
