"""One round of training: the optimizer steps over a fixed set of examples."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from ttpa.errors import InputError
from ttpa.training.batches import plan_steps
from ttpa.training.checkpoint import Checkpoints
from ttpa.training.config import TrainConfig
from ttpa.training.examples import Example
from ttpa.training.flops import ModelShape, PackSize, pack_flops, size_of_batch, size_without_sharing
from ttpa.training.monitor import Monitor, Work, eval_metrics
from ttpa.training.objective import Metrics, Objective, coefficients
from ttpa.training.optimizer import learning_rate
from ttpa.training.packing import StepPlan, plan_step
from ttpa.training.policy import Policy
from ttpa.training.reference import MovingReference
from ttpa.training.selfcheck import check_classes, check_packing, check_start
from ttpa.training.stop import STOPPED, StopSignal
from ttpa.world import World

Online = Callable[[], AbstractContextManager[None]]
"""A context in which the policy computes as its reference does."""


@dataclass
class Run:
    """What the rounds of a run share; what was done in the rounds before this one, the number of steps that were left
    out so far, and under which key the reference of this round is cached."""

    config: TrainConfig
    world: World
    objective: Objective
    monitor: Monitor
    checkpoints: Checkpoints
    stop: StopSignal
    done: dict[str, int] = field(default_factory=lambda: {"steps": 0, "pairs": 0, "tokens": 0})
    skipped: int = 0
    reference_key: str = ""

    @property
    def skipped_path(self) -> Path:
        """Where steps that were left out are written down."""
        return self.config.output / "skipped_steps.jsonl"

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint; what was written down behind it is cut off."""
        self.done, self.skipped, self.reference_key = state["done"], state["skipped"], state["reference"]
        if self.world.main and self.skipped_path.exists():
            lines = self.skipped_path.read_text(encoding="utf-8").splitlines(keepends=True)
            self.skipped_path.write_text("".join(lines[: self.skipped]), encoding="utf-8")


@dataclass(frozen=True)
class Round:
    """One round: its number from 1, its examples and those set aside for evaluation, the context in which the policy
    computes as its reference does (where that is not known before), and what moves the reference."""

    number: int
    examples: Sequence[Example]
    eval_examples: Sequence[Example] = ()
    online: Online | None = None
    moving: MovingReference | None = None

    def steps(self, config: TrainConfig) -> list[tuple[float, list[int]]]:
        """The optimizer steps: the epochs done after each, and the indexes of its examples."""
        return plan_steps(
            [len(example.tree.pairs) for example in self.examples],
            batch_size=config.batch_size,
            num_epochs=config.num_train_epochs,
            max_steps=config.max_steps,
            seed=config.seed + self.number,
        )


def train_round(
    policy: Policy, optimizer: torch.optim.Optimizer, round: Round, run: Run, *, first_step: int = 0
) -> None:
    """Train a policy in place on the examples of a round, its first `first_step` steps being done already.

    Every process plans every step from the same examples, so that all know the denominators of the whole step, and
    computes its packs; gradients are sums over packs and processes. A step whose loss or gradient is not finite is
    left out and written down; raises InputError when there are more than `max_skipped_steps` of them, and when the
    first step shows that packed passes are not exact or that the policy does not start at its reference
    (`selfcheck`). Told to stop, it saves a checkpoint and exits with the code STOPPED.
    """
    config, world, objective, monitor = run.config, run.world, run.objective, run.monitor
    shape, steps = ModelShape.of(policy.model), round.steps(config)
    monitor.start_round(round.number, total_steps=len(steps))
    policy.eval()  # no pass drops anything, however a model writes its dropout; gradients do not ask for the mode
    for step, (epoch, batch) in enumerate(steps[first_step:], start=first_step + 1):
        rate = learning_rate(step - 1, total=len(steps), config=config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        plan = lay_out([round.examples[i] for i in batch], shape, run)
        checked = config.selfcheck and step == 1 and round.number == 1
        if checked:
            check_packing(policy, plan.examples, world=world)
            counts = check_classes(plan.examples, objective)
            if world.main:
                tqdm.write(
                    f"          first step trains {', '.join(f'{n} {name}' for name, n in counts.items())} tokens"
                )
        metrics, work = accumulate(policy, plan, round, run, shape=shape, report=monitor.due)
        norm = clip(policy, config.max_grad_norm)
        finite = math.isfinite(metrics["loss"]) and math.isfinite(norm)
        if checked and finite and config.ref_model is None:
            check_start(metrics, objective, bf16=policy.bf16, path=config.data)
        if finite:
            optimizer.step()
        else:
            leave_out(step, plan, metrics, norm, round, run)
        optimizer.zero_grad()
        if round.moving is not None:
            round.moving.after_step(step)

        metrics = {**metrics, "grad_norm": norm, "waste": plan.waste, "free": plan.free}
        monitor.step(metrics, work=work, learning_rate=rate, epoch=epoch)
        last, score = step == len(steps), None
        with monitor.paused():
            if round.eval_examples and (last or step % config.eval_steps == 0):
                score = evaluate(policy, round, run, shape)
            stopping = world.any(run.stop.asked)
            if stopping or (config.save_steps and (last or step % config.save_steps == 0)):
                save(policy, optimizer, step, round, run, score=score)
        if stopping:
            if world.main:
                tqdm.write(f"stopped   step {step} is saved; the same command with --resume auto goes on")
            raise SystemExit(STOPPED)
    done = {
        "steps": len(steps),
        "pairs": sum(len(round.examples[i].tree.pairs) for _, batch in steps for i in batch),
        "tokens": monitor.num_tokens,
    }
    run.done = {name: run.done[name] + count for name, count in done.items()}


def lay_out(examples: Sequence[Example], shape: ModelShape, run: Run) -> StepPlan:
    """The packs of one step on every process."""
    return plan_step(
        examples,
        pack_tokens=run.config.pack_tokens,
        world_size=run.world.size,
        cost=partial(run.objective.cost, shape=shape),
        whole=run.objective.whole,
    )


def accumulate(
    policy: Policy,
    plan: StepPlan,
    round: Round,
    run: Run,
    *,
    shape: ModelShape,
    report: bool,
    backward: bool = True,
) -> tuple[Metrics, Work]:
    """Add the gradient of one step, over this process's packs, to the policy's; returns the metrics of the whole step,
    over all processes, with `report` those of whole completions as well, and what was processed."""
    objective, device = run.objective, run.world.device
    denominators = objective.denominators(plan.examples)
    num_pairs = sum(len(example.tree.pairs) for example in plan.examples)
    total: dict[str, Any] = {}
    size = PackSize(0, 0, 0, 0)
    for indexes in plan.packs[run.world.rank]:
        # a process without a pack of its own takes part with one that weighs nothing
        weight, examples = float(bool(indexes)), [plan.examples[i] for i in indexes or [-1]]
        pack = objective.pack(examples)
        matrices = coefficients(pack, device)
        pack = pack.to(device)
        ref_logp_R, distribution = pack.ref_logp_R, None
        if round.online is not None:
            with round.online():
                if objective.reference == "distribution":
                    distribution = policy.distribution(pack)
                if ref_logp_R is None:
                    ref_logp_R = policy.logps(pack, report=report)
        whole = report and ref_logp_R is not None and objective.pairs
        if indexes:
            computed = size_of_batch(pack)
            size += computed if whole else replace(computed, reported_rows=0)
        with torch.set_grad_enabled(backward):
            rows = policy.rows(pack, report=whole, reference=distribution)
            loss, parts = objective.loss(
                rows, pack, ref_logp_R=ref_logp_R, denominators=denominators, num_pairs=num_pairs, matrices=matrices
            )
        if backward:
            (weight * loss).backward()
        values: dict[str, Any] = dict(parts)
        if whole:
            assert ref_logp_R is not None
            values |= objective.report(rows, pack, examples, ref_logp_R=ref_logp_R, num_pairs=num_pairs)
        for name, value in values.items():
            total[name] = total.get(name, 0.0) + weight * value
    if not backward and isinstance(policy, FSDPModule):
        policy.reshard()
    counts = {"tokens": size.tokens, "flops": pack_flops(shape, size)}
    summed = run.world.sum({**{name: float(value) for name, value in total.items()}, **counts})
    work = Work(
        pairs=num_pairs,
        tokens=int(summed.pop("tokens")),
        equivalent_tokens=size_without_sharing([example.tree for example in plan.examples]).tokens,
        flops=summed.pop("flops"),
    )
    return objective.metrics(summed), work


def clip(policy: Policy, longest: float) -> float:
    """Scale the gradient down to a norm of `longest` (0: leave it) and return the norm that it had."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, longest or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def evaluate(policy: Policy, round: Round, run: Run, shape: ModelShape) -> float:
    """Write TRL's `eval_` metrics of the examples set aside, means over all of them, and return their loss."""
    start = time.perf_counter()
    plan = lay_out(round.eval_examples, shape, run)
    metrics, work = accumulate(policy, plan, round, run, shape=shape, report=True, backward=False)
    run.monitor.report(eval_metrics(metrics, seconds=time.perf_counter() - start, pairs=work.pairs))
    return metrics["loss"]


def leave_out(step: int, plan: StepPlan, metrics: Metrics, norm: float, round: Round, run: Run) -> None:
    """Write down a step that is not finite, with the ids of its trees; raises InputError when there are too many."""
    run.skipped += 1
    trees = sorted({example.tree.id for example in plan.examples})
    record = {"round": round.number, "step": step, "loss": str(metrics["loss"]), "grad_norm": str(norm), "trees": trees}
    if run.world.main:
        with open(run.skipped_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    if run.skipped > run.config.max_skipped_steps:
        raise InputError(
            f"step {step}: the loss is {metrics['loss']} and the gradient's norm {norm}; {run.skipped} steps were left "
            f"out and --max_skipped_steps is {run.config.max_skipped_steps}. Their trees stand in {run.skipped_path}; "
            "try a lower --learning_rate, and --bf16 false if it is on"
        )


def save(
    policy: Policy, optimizer: torch.optim.Optimizer, step: int, round: Round, run: Run, *, score: float | None
) -> None:
    """Write a checkpoint after a step."""
    run.checkpoints.save(
        run.monitor.steps,
        policy=policy,
        optimizer=optimizer,
        state={
            "round": round.number,
            "step": step,
            "done": run.done,
            "skipped": run.skipped,
            "reference": run.reference_key,
            "monitor": run.monitor.state(),
        },
        tensors=None if round.moving is None else round.moving.state(),
        score=score,
    )
