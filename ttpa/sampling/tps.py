"""Token-level preference sampling: write an answer to every decision, fork it where the model hesitates, score all."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedModel

from ttpa.data.decisions import Decision, all_decisions, check_template
from ttpa.data.dialogues import Dialogue
from ttpa.sampling.assemble import paths_to_tree, scored
from ttpa.sampling.options import SamplingOptions
from ttpa.sampling.paths import Paths, PathWriter
from ttpa.sampling.report import SamplingReport
from ttpa.sampling.stop import Stop
from ttpa.trees.record import PreferenceTree


class Progress(NamedTuple):
    """How far a run is: decisions done and in all, what was made so far, and pages of the cache in use and in all."""

    done: int
    total: int
    decoded_tokens: int
    pairs: int
    pages_used: int
    pages: int


class Writer(Protocol):
    """What writes the paths of decisions: `ttpa.sampling.paths.PathWriter`, or another engine in its place. `origin`
    says in the trees with which model and engine that was."""

    tokenizer: Any
    options: SamplingOptions
    stop: Stop
    origin: dict[str, Any]

    def write(
        self,
        decisions: Sequence[Decision],
        *,
        report: SamplingReport,
        after_pass: Callable[[int, int], None] | None = None,
    ) -> Iterator[Paths]:
        """See `PathWriter.write`."""


def sample_trees(
    model: PreTrainedModel,
    tokenizer: Any,
    dialogues: Iterable[Dialogue],
    *,
    options: SamplingOptions | None = None,
    max_length: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[list[PreferenceTree], SamplingReport]:
    """Sample one preference tree for every decision of the dialogues, and say what came of it.

    A tree holds the model's answers (mode `options.mode`), the gold answer, their strict ESM scores and errors, and a
    pair of an exact answer over every wrong one. Answers that say the same as an earlier one are dropped; so is a tree
    without a pair. Trees stand in the order of the decisions; decisions whose prompt and gold answer have more than
    `max_length` tokens (None: any number) are left out and reported. `progress` is called after every pass. Equal
    arguments give equal trees; other rows beside a path change it by float rounding only; the model keeps its mode.
    Raises InputError for what the chat template refuses and for a tree that the cache cannot hold.
    """
    options, report = options or SamplingOptions(), SamplingReport()
    found = all_decisions(dialogues, tokenizer, max_length=max_length)
    writer = PathWriter(model, tokenizer, [d for d in found if d.dropped is None], options=options)
    sampled = sample_decisions(writer, found, report=report, progress=progress)
    return [tree for _, tree in sampled if tree is not None], report


def sample_decisions(
    writer: Writer,
    decisions: Sequence[Decision],
    *,
    report: SamplingReport,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[tuple[int, PreferenceTree | None]]:
    """As `sample_trees`, one tree at a time: the index of a decision and its tree, None where it has none, in order,
    each as soon as it and all before it are done. With a `PathWriter` what comes is a function of the arguments alone,
    to the bit. One writer serves any parts of the decisions that it was made for."""
    tokenizer, stop = writer.tokenizer, writer.stop
    began = time.perf_counter()
    report.decisions += len(decisions)
    if writer.options.mode == "tps":
        report.exact_trunks = report.exact_trunks or 0
    usable, golds = [], {}
    for i, decision in enumerate(decisions):
        gold = scored(tokenizer, decision, "gold", stop.cut(decision.gold_ids), "stop")
        if decision.dropped is not None:
            report.drop(decision.id, decision.dropped)
        elif gold.leaf.score != 1.0:
            report.drop(decision.id, "the gold answer is not exact when it is read back")
        else:
            golds[i] = gold
            usable.append(i)
    trees: dict[int, PreferenceTree | None] = {i: None for i in range(len(decisions)) if i not in golds}
    done = len(trees)

    def after_pass(pages_used: int, pages: int) -> None:
        if progress is not None:
            progress(Progress(done, len(decisions), report.decoded_tokens, report.pairs, pages_used, pages))

    asked = [decisions[i] for i in usable]
    if asked:
        check_template(asked[0], tokenizer)
    template = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]
    origin = {**writer.origin, "template": template, "sampling": asdict(writer.options)}
    reported = 0
    for number, paths in writer.write(asked, report=report, after_pass=after_pass):
        i = usable[number]
        trees[i] = paths_to_tree(tokenizer, decisions[i], paths, gold=golds[i], origin=origin, report=report)
        done += 1
        report.seconds += time.perf_counter() - began
        while reported in trees:
            yield reported, trees.pop(reported)
            reported += 1
        began = time.perf_counter()
    report.seconds += time.perf_counter() - began
    yield from sorted(trees.items())
