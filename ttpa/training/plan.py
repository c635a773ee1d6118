"""`--plan`: memory, steps, tokens and time of a run, before any weight is loaded.

python -m ttpa.train --model ORG/MODEL --data rows.jsonl --plan
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ttpa.errors import InputError
from ttpa.esm.weights import WeightOptions
from ttpa.model import use_tree_attention
from ttpa.training.batches import plan_steps
from ttpa.training.config import TrainConfig
from ttpa.training.examples import Example, make_examples
from ttpa.training.flops import ModelShape, PackSize, size_without_sharing
from ttpa.training.lora import add_lora, lora_layers
from ttpa.training.objective import Objective
from ttpa.training.packing import plan_step
from ttpa.training.plan_memory import Kind
from ttpa.training.plan_table import Layout, Part, device_memory, gigabytes, memory_table, render, total
from ttpa.training.rates import Rate, rate_of
from ttpa.training.setup import lora_options
from ttpa.trees.pack import TreeBatch, completion_tokens
from ttpa.trees.record import PreferenceTree

ROOM = 0.95  # of a device's memory; the rest is for libraries and what allocators cannot use


@dataclass(frozen=True)
class Work:
    """What a run computes: optimizer steps, packs of all of them on all processes, the most on one in a step, pairs,
    sizes of what is computed and of what a trainer without sharing computes, flops, and the pack with most tokens."""

    steps: int
    packs: int
    packs_per_step: int
    pairs: int
    size: PackSize
    unshared: PackSize
    flops: int
    slowest_flops: int  # of the processes that each place waits for, summed over places and steps
    cache_bytes: int
    largest: TreeBatch


def lay_out_work(
    examples: Sequence[Example], *, objective: Objective, model: PreTrainedModel, config: TrainConfig, world_size: int
) -> Work:
    """Lay out the steps of a round's first epoch as training does; the other epochs are taken to be like it."""
    shape = ModelShape.of(model)
    steps = plan_steps(
        [len(example.tree.pairs) for example in examples],
        batch_size=config.batch_size,
        num_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        seed=config.seed + 1,
    )
    first = [batch for epoch, batch in steps if epoch <= 1]
    epochs = len(steps) / len(first)
    packs = pairs = places = cost = slowest = 0
    largest: tuple[int, list[Example]] = (0, [])
    size = unshared = PackSize(0, 0, 0, 0)
    for batch in first:
        plan = plan_step(
            [examples[i] for i in batch],
            pack_tokens=config.pack_tokens,
            world_size=world_size,
            cost=partial(objective.cost, shape=shape),
            whole=objective.whole,
        )
        places = max(places, len(plan.packs[0]))
        slowest += int(sum(max(costs) for costs in zip(*plan.costs, strict=True)))
        unshared += size_without_sharing([example.tree for example in plan.examples])
        for rank, (indexes, tokens) in enumerate(zip(plan.packs, plan.tokens, strict=True)):
            for place, (pack, length) in enumerate(zip(indexes, tokens, strict=True)):
                if not pack:
                    continue
                chosen = [plan.examples[i] for i in pack]
                packs += 1
                cost += int(plan.costs[rank][place])
                pairs += sum(len(example.tree.pairs) for example in chosen)
                largest = max(largest, (length, chosen), key=lambda found: found[0])
                size += PackSize(length, 0, 0, 0)
    assert largest[1], "there is nothing to train on"
    return Work(
        steps=len(steps),
        packs=round(packs * epochs),
        packs_per_step=places,
        pairs=round(pairs * epochs),
        size=_times(size, epochs),
        unshared=_times(unshared, epochs),
        flops=round(cost * epochs),
        slowest_flops=round(slowest * epochs),
        cache_bytes=4 * sum(completion_tokens(example.tree) for example in examples),
        largest=objective.pack(largest[1]),
    )


def _times(size: PackSize, factor: float) -> PackSize:
    return PackSize(*(round(value * factor) for value in vars(size).values()))


class Plan(NamedTuple):
    """A planned run: the number of its processes, what it computes, the memory table of one process, how fast a device
    is, and the bytes that it has."""

    world_size: int
    work: Work
    table: list[Part]
    rate: Rate
    available: int


def make_plan(
    examples: Sequence[Example],
    *,
    model: PreTrainedModel,
    objective: Objective,
    config: TrainConfig,
    device: torch.device,
    world_size: int = 1,
    grouped: bool = False,
) -> Plan:
    """The plan of a run over examples. `model` is what is trained, with its adapter where it has one, and may lie on
    the meta device; `grouped`: FSDP2 shards it, even over one process. With `memory_gb` on a machine without a GPU the
    plan is one for a GPU of that memory."""
    kind: Kind = "cuda" if device.type == "cuda" or config.memory_gb is not None else "cpu"
    work = lay_out_work(examples, objective=objective, model=model, config=config, world_size=world_size)
    sharded = grouped or world_size > 1
    layout = Layout(
        kind=kind,
        shards=(config.shard_size or world_size) if sharded else None,
        bf16=config.bf16,
        checkpointing=config.activation_checkpointing,
        offload=config.offload,
        four_bit=config.load_in_4bit,
        moving_reference=config.sync_ref_model or objective.reference == "distribution",
        divergence=objective.reference == "distribution",
    )
    table = memory_table(model, work.largest, layout=layout, packs_per_step=work.packs_per_step)
    available = device_memory(device) if config.memory_gb is None else int(config.memory_gb * 2**30)
    rate = rate_of(device if kind == device.type else None, bf16=config.bf16)
    return Plan(world_size, work, table, rate, available)


def report(plan: Plan, *, config: TrainConfig, changes: Sequence[str] = ()) -> str:
    """The plan as text; `changes` are the lines of `what_to_change`."""
    work, rate = plan.work, plan.rate
    ratio = work.unshared.tokens / work.size.tokens
    lines = [
        f"memory of one process of {plan.world_size}, at its peak",
        render(plan.table),
        f"{'fits into' if fits(plan) else 'does NOT fit into'} {gigabytes(plan.available)}",
        *changes,
        "",
        f"steps     {work.steps:,} of about {work.pairs / work.steps:.1f} pairs, {work.packs:,} packs of at most "
        f"{config.pack_tokens:,} tokens, at most {work.packs_per_step} a process and step; the largest has "
        f"{len(work.largest.ids_T):,}",
        f"tokens    {work.size.tokens:,} computed; a trainer that shares no prompt computes {work.unshared.tokens:,} "
        f"({ratio:.1f} times)",
        f"flops     {work.flops / work.steps:.3g} a step, {work.flops:.3g} in all",
        f"cache     {gigabytes(work.cache_bytes)} on disk for log-probabilities of the reference",
        f"time      {_time(work, rate)}",
    ]
    return "\n".join(lines)


def fits(plan: Plan) -> bool:
    """Whether the table leaves some of the memory free."""
    return total(plan.table) <= ROOM * plan.available


def _time(work: Work, rate: Rate) -> str:
    if rate.flops is None:
        return f"not measured: {rate.source}"
    seconds = work.slowest_flops / rate.flops
    return (
        f"{seconds / work.steps:,.3g} s a step, {_duration(seconds)} in all, at {rate.flops:.3g} flops/s: {rate.source}"
    )


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def what_to_change(
    made: Plan, examples: Sequence[Example], *, plan: Callable[..., Plan], model: PreTrainedModel, config: TrainConfig
) -> list[str]:
    """What makes a run take less memory, in order of what it costs, each alone and with the bytes that it saves on a
    device; what saves nothing is left out. `plan` is `make_plan` with all arguments but the examples."""
    world_size: int = made.world_size

    def again(new: TrainConfig, **changed: Any) -> list[Part]:
        return plan(examples, config=new, **changed).table

    def with_adapter() -> list[Part]:
        return again(replace(config, use_peft=True), model=add_lora(copy.deepcopy(model), lora_options(config)))

    processes = 2 * world_size
    options: list[tuple[str, Callable[[], list[Part]]]] = []
    longest = len(made.work.largest.ids_T)
    if longest > 1:
        half = -(-min(longest, config.pack_tokens) // 2)
        options.append((f"--pack_tokens {half}", lambda: again(replace(config, pack_tokens=half))))
    if config.activation_checkpointing != "full":
        full = replace(config, activation_checkpointing="full")
        options.append(("--activation_checkpointing full", lambda: again(full)))
    if config.shard_size is None:
        options.append((f"{processes} processes instead of {world_size}", lambda: again(config, world_size=processes)))
    if not lora_layers(model):
        options.append(("--use_peft", with_adapter))
    if config.offload == "none":
        options.append(("--offload activations", lambda: again(replace(config, offload="activations"))))
        options.append(("--offload optimizer", lambda: again(replace(config, offload="optimizer"), grouped=True)))
    lines = ["what to change, in order of what it costs:"]
    for name, table in options:
        try:
            needed = total(table())
        except InputError:  # an adapter that this model or this machine does not take
            continue
        if needed < total(made.table):
            enough = "enough" if needed <= ROOM * made.available else "not enough alone"
            lines.append(f"  {name:34} saves {gigabytes(total(made.table) - needed):>11}: {enough}")
    return lines


def plan_text(
    trees: Sequence[PreferenceTree],
    *,
    source: Path | str,
    tokenizer: Any,
    objective: Objective,
    config: TrainConfig,
    device: torch.device,
    world_size: int = 1,
    grouped: bool = False,
) -> str:
    """What `--plan` prints for the trees of a run; raises InputError where there is nothing to train on."""
    model = model_without_weights(source, config=config)
    examples = planned_examples(trees, tokenizer=tokenizer, objective=objective, config=config)
    if not examples:
        raise InputError("there is no pair to train on", path=config.data)
    plan = partial(
        make_plan,
        objective=objective,
        device=device,
        world_size=world_size,
        grouped=grouped,
        model=model,
        config=config,
    )
    made = plan(examples)
    changes = [] if fits(made) else what_to_change(made, examples, plan=plan, model=model, config=config)
    return report(made, config=config, changes=changes)


def model_without_weights(source: Path | str, *, config: TrainConfig) -> PreTrainedModel:
    """The model that would be trained, with its adapter where it gets one, on the meta device; raises InputError for
    what `load_model` refuses."""
    try:
        described = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be loaded: {error}", path=source) from error
    with torch.device("meta"):
        model = use_tree_attention(AutoModelForCausalLM.from_config(described, dtype=torch.float32))
    if config.use_peft:
        add_lora(model, lora_options(config))
    return model


def planned_examples(
    trees: Sequence[PreferenceTree], *, tokenizer: Any, objective: Objective, config: TrainConfig
) -> list[Example]:
    """The examples of a run, in which every token that a helper model would weigh weighs the same."""
    equal = [[(tree.trained(pair.chosen), tree.trained(pair.rejected)) for pair in tree.pairs] for tree in trees]
    return make_examples(
        trees,
        tokenizer=tokenizer,
        terms=objective.terms,
        options=objective.options,
        token_weights=config.token_weights,
        error_weights=WeightOptions(error=config.error_weight, follow=config.follow_weight),
        scores=equal if objective.scores else None,
    )
