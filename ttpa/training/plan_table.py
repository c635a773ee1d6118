"""What takes memory on one device, part by part: counted before a run, or measured when it has run out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ttpa.training.hardware import peak_memory
from ttpa.training.memory import Checkpointing
from ttpa.training.plan_memory import Kind, PassOptions, pass_peak
from ttpa.trees.pack import TreeBatch

HEAP_SHARE: dict[Checkpointing, float] = {"none": 0.3, "selective": 0.7, "full": 1.2}
"""What glibc's heap holds between tensors, as a share of those that come and go, by activation checkpointing
(`python -m bench.plan`; selective is taken to lie between the others). It differs from run to run, and is nothing where
MALLOC_MMAP_THRESHOLD_ is set low."""


class Part(NamedTuple):
    """A row of the table: what takes memory on one device, how many bytes, and how they were counted."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class Layout:
    """How a run is laid out on devices, as far as memory is concerned."""

    kind: Kind
    shards: int | None = None  # processes that share one copy of the weights; None: one process without FSDP2
    bf16: bool = False
    checkpointing: Checkpointing = "none"
    offload: str = "none"
    four_bit: bool = False
    moving_reference: bool = False
    divergence: bool = False


def memory_table(model: PreTrainedModel, pack: TreeBatch, *, layout: Layout, packs_per_step: int = 1) -> list[Part]:
    """The memory of one process at its peak, part by part: `model`, which may lie on the meta device and of which only
    the shapes are read, with its adapter where it has one, in training on packs like `pack`, its largest. AdamW has two
    fp32 numbers for each trained one (arXiv 1711.05101). Activations are followed through a pass without contents
    (`plan_memory`), at the peak of the second step and all after it, when the optimizer has its states."""
    shards = layout.shards or 1
    sharded, states_aside = layout.shards is not None, layout.offload == "optimizer"
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    peak = pass_peak(
        model,
        pack,
        PassOptions(
            kind=layout.kind,
            bf16=layout.bf16,
            sharded=sharded,
            checkpointing=layout.checkpointing,
            offload_activations=layout.offload == "activations",
            divergence=layout.divergence,
            accumulates=packs_per_step > 1,
        ),
    )
    over = f", over {shards} processes" if sharded else ""
    kept = sum(_kept_bytes(model, layout.four_bit)) // shards
    rows = [Part("weights", kept, f"{sum(p.numel() for p in parameters):,} as they are kept{over}")]
    if sharded:
        rows += _gathered(model, layout)
        rows.append(Part("gradients", 4 * trained // shards, f"fp32, {trained:,} trained weights{over}"))
    else:
        rows.append(Part("gradients", peak.gradients, f"fp32, those there at the peak, of {4 * trained / 1e6:,.0f} MB"))
    rows.append(Part("optimizer", 8 * trained // shards, f"AdamW, 2 x fp32 for {trained:,} trained weights{over}"))
    if layout.moving_reference:
        rows.append(Part("reference", 4 * trained // shards, f"a copy of the trained weights{over}"))
    if layout.divergence:
        head = model.get_output_embeddings().weight.numel() * (2 if layout.bf16 else 4)
        rows.append(Part("reference head", head, "a copy of the head's weight, for the divergence"))
    recomputed = {"none": "all are kept", "selective": "some computed again", "full": "computed again block by block"}
    tokens = f"{len(pack.ids_T):,} tokens"
    rows.append(Part("activations", peak.activations, f"largest pack, {tokens}; {recomputed[layout.checkpointing]}"))
    rows.append(Part("head", peak.head, f"workspace of the fused head at the peak, {pack.num_trained:,} trained rows"))
    rows.append(Part("batch", peak.batch, f"the pack itself and its attention mask, {tokens}"))
    if states_aside:
        moved = {"weights", "gradients", "optimizer"}
        rows = [row._replace(bytes=0, how=f"{row.how}; in CPU memory") if row.name in moved else row for row in rows]
    if layout.kind == "cpu" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        passing = peak.activations + peak.head + peak.gradients
        share = HEAP_SHARE[layout.checkpointing]
        rows.append(
            Part("allocator", int(share * passing), f"what glibc holds between tensors, about {share:.0%} more")
        )
    return rows


def _kept_bytes(model: PreTrainedModel, four_bit: bool) -> Iterator[int]:
    """Bytes of each weight at rest; in 4 bits every frozen matrix of the decoder's blocks, with its scales."""
    blocks = {id(p) for block in model.get_decoder().layers for p in block.parameters()}
    for p in model.parameters():
        packed = four_bit and id(p) in blocks and p.ndim == 2 and not p.requires_grad
        yield int(p.numel() * (4.13 / 8)) if packed else p.nbytes


def _gathered(model: PreTrainedModel, layout: Layout) -> list[Part]:
    """What FSDP2 holds beside the shards: whole weights of the root and of two blocks, as the next is fetched while one
    computes, and whole gradients of the root and of a block on their way to their shards, in fp32."""
    size = 2 if layout.bf16 else 4
    blocks = [list(block.parameters()) for block in model.get_decoder().layers]
    in_blocks = {id(p) for block in blocks for p in block}
    root = [p for p in model.parameters() if id(p) not in in_blocks]

    def count(parameters: Iterable[torch.Tensor], *, trained: bool = False) -> int:
        return sum(p.numel() for p in parameters if p.requires_grad or not trained)

    largest, largest_trained = max(map(count, blocks)), max(count(block, trained=True) for block in blocks)
    weights = size * (count(root) + 2 * largest)
    gradients = size * count(root, trained=True) + (size + 4) * max(largest_trained, 0)
    dtype = "bf16" if layout.bf16 else "fp32"
    return [
        Part("gathered weights", weights, f"{dtype}, embedding and head, and two blocks"),
        Part("whole gradients", gradients, f"{dtype}, embedding and head, and a block with its fp32 sum"),
    ]


def total(table: Sequence[Part]) -> int:
    """Bytes of all rows."""
    return sum(part.bytes for part in table)


def gigabytes(number: float) -> str:
    """Bytes as text, in GiB, or in MiB where that is little."""
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"


def render(table: Sequence[Part]) -> str:
    """The table as text, its sum last."""
    rows = [*table, Part("total", total(table), "")]
    width = max(len(part.name) for part in rows)
    return "\n".join(f"{part.name:{width}}  {gigabytes(part.bytes):>12}  {part.how}".rstrip() for part in rows)


THREE_OPTIONS = (
    "a smaller --pack_tokens: the same gradient from shorter passes",
    "--activation_checkpointing full: blocks are computed again in the backward pass",
    "more processes (torchrun --nproc-per-node), --use_peft, or --offload activations",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or on the CPU."""
    said = str(error)
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in said or "not enough memory" in said)
    )


def explain_out_of_memory(error: BaseException, table: Sequence[Part], device: torch.device) -> str:
    """What a run that is out of memory tells: the error, the plan beside what was measured, and what to change."""
    lines = [f"out of memory on {device}: {(str(error).splitlines() or [type(error).__name__])[0]}", "", render(table)]
    lines += ["", *(f"{name:24}{gigabytes(number):>12}" for name, number in _measured(device).items())]
    return "\n".join([*lines, "", "What to change, cheapest first:", *(f"  {option}" for option in THREE_OPTIONS)])


def _measured(device: torch.device) -> dict[str, int]:
    """What this process had and has, as the system counts it."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        free, size = torch.cuda.mem_get_info(device)
        return {
            "measured: tensors, most": stats["allocated_bytes.all.peak"],
            "measured: tensors, now": stats["allocated_bytes.all.current"],
            "measured: reserved, now": stats["reserved_bytes.all.current"],
            "free on the device": free,
            "memory of the device": size,
        }
    found = {"measured: process, most": peak_memory(device), "memory of the machine": device_memory(device)}
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            found["measured: process, now"] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return found


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
