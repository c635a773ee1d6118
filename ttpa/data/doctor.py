"""What a data file holds and what a run would do with it: the checks and the tables of `python -m ttpa.data check`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ttpa.data.benchmark import read_benchmark
from ttpa.data.build import Limits
from ttpa.data.decisions import Decision, check_template, decisions
from ttpa.data.dialogues import Dialogue
from ttpa.data.findings import Calls, Finding, call_findings, fork_findings, repeated_pairs, tree_findings
from ttpa.data.formats.bfcl import BFCL
from ttpa.data.formats.format import Place, RowFormat
from ttpa.data.messages import calls_of
from ttpa.data.read import Kind, kind_of, read_data, read_dialogues
from ttpa.data.report import DataReport
from ttpa.data.rows import iterate_rows
from ttpa.errors import InputError
from ttpa.tools.dialects.detect import find_dialect
from ttpa.trees.classes import class_counts, tree_classes
from ttpa.trees.record import Completion, Leaf, PreferenceTree, merge_completions


@dataclass
class Checkup:
    """What was found in one file: `errors` are what a run refuses, each with its place; `report` says what it leaves
    out, takes otherwise than it stands there, and counts; `findings` have the keys id, where, finding and detail;
    `tokens` counts the tokens of each class, and `lengths` holds those of prompts, of completions and of the longest
    path through each tree, in tokens."""

    report: DataReport
    holds: Kind | None = None
    errors: list[str] = field(default_factory=list)
    findings: list[dict[str, str]] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"prompt": [], "completion": [], "whole": []})

    def find(self, id: str, where: str, findings: Iterable[Finding]) -> None:
        """List findings; an InputError among them is listed as an error."""
        try:
            for finding, detail in findings:
                self.findings.append({"id": id, "where": where, "finding": finding, "detail": detail})
        except InputError as error:
            self.errors.append(f"{where}: {id!r}: {error}")

    def measure(self, prompt: int, completions: list[int]) -> None:
        """Add the lengths of one prompt and its completions, in tokens."""
        for name, lengths in zip(
            self.lengths, ([prompt], completions, [prompt + max(completions, default=0)]), strict=True
        ):
            self.lengths[name] += lengths
        self.tokens["prompt"] += prompt

    def to_dict(self) -> dict[str, Any]:
        """All of it as one JSON object, with numbers before the lists that they count."""
        return {
            "path": self.report.path,
            "holds": self.holds,
            "num_errors": len(self.errors),
            "errors": self.errors,
            "report": self.report.to_dict(),
            "findings_by_kind": dict(Counter(entry["finding"] for entry in self.findings)),
            "findings": self.findings,
            "tokens_by_class": dict(self.tokens),
            "lengths": {name: summary(lengths) for name, lengths in self.lengths.items() if lengths},
        }


def summary(lengths: list[int]) -> dict[str, Any]:
    """How many lengths there are, the least, the median, the one that 95 of 100 do not exceed, the most, and how many
    lie in (bound / 2, bound] for each power of two that has some."""
    ordered = sorted(lengths)
    bins = Counter(1 << (length - 1).bit_length() for length in ordered)
    return {
        "number": len(ordered),
        "least": ordered[0],
        "median": ordered[(len(ordered) - 1) // 2],
        "95 %": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "most": ordered[-1],
        "histogram": {str(bound): bins[bound] for bound in sorted(bins)},
    }


def check_file(path: Path, *, tokenizer: Any, max_length: int | None) -> Checkup:
    """Check one file, or folder of them, whatever it holds. Lengths are those of the tokenizer's tokens, and what is
    longer than `max_length` (None: nothing is) is counted among what a run leaves out. Never raises InputError: what a
    run refuses is listed."""
    checkup = Checkup(DataReport(path=str(path), format="unknown"))
    try:
        checkup.holds, row_format = kind_of(path)
        if checkup.holds == "evaluation":
            assert row_format is not None  # only rows are
            _check_benchmark(checkup, path, row_format)
        elif checkup.holds == "dialogues":
            _check_dialogues(checkup, path, tokenizer, max_length)
        else:
            _check_trees(checkup, path, tokenizer, max_length)
    except InputError as error:
        checkup.errors.append(str(error))
        checkup.report.note("not all was checked: the last error ended the reading")
    return checkup


def _check_trees(checkup: Checkup, path: Path, tokenizer: Any, max_length: int | None) -> None:
    trees, checkup.report = read_data(
        path, tokenizer=tokenizer, max_length=None, on_error=lambda error: checkup.errors.append(str(error))
    )
    report, limits = checkup.report, Limits(max_length)
    highest = max((max(ids) for tree in trees for ids in (tree.prompt_ids, *(n.ids for n in tree.nodes))), default=0)
    if highest >= len(tokenizer):
        problem = f"token {highest} is in a tree, and the tokenizer has {len(tokenizer)}: name theirs with --model"
        raise InputError(problem, path=path)
    report.kept = pairs = 0
    for tree in trees:
        checkup.measure(len(tree.prompt_ids), [len(tree.completion_ids(leaf)) for leaf in range(len(tree.leaves))])
        if not tree.pairs:
            report.drop(tree.id, _where(tree.origin, path), "no pair", "none of its answers is preferred to another")
        elif limits.keep(tree, _where(tree.origin, path), report):
            report.kept += 1
            pairs += len(tree.pairs)
    report.counts["pairs kept"] = pairs
    if not pairs and not checkup.errors:
        checkup.errors.append(f"{path}: no pair is left, and there is nothing to train on")
    read_text = _reads_calls(tokenizer, report)
    pairs_seen: dict[Any, str] = {}
    for tree in _shown(trees, path):
        class_N, where = tree_classes(tree, tokenizer), _where(tree.origin, path)
        checkup.tokens.update(class_counts(class_N))
        checkup.find(tree.id, where, tree_findings(tree, tokenizer, read_text=read_text))
        checkup.find(tree.id, where, repeated_pairs(tree, pairs_seen))
        checkup.find(tree.id, where, fork_findings(tree, class_N))


def _check_dialogues(checkup: Checkup, path: Path, tokenizer: Any, max_length: int | None) -> None:
    dialogues, checkup.report = read_dialogues(path, on_error=lambda error: checkup.errors.append(str(error)))
    report = checkup.report
    report.counts |= {"dialogues": len(dialogues), "decisions": 0, "calls": 0}
    for dialogue in _shown(dialogues, path):
        calls, where = calls_of(dialogue.messages), _where(dialogue.source, path)
        if not calls:
            report.drop(dialogue.id, where, "no tool is called", "there is no gold answer to compare with")
            report.kept -= 1
            continue
        report.counts["calls"] += len(calls)
        checkup.find(dialogue.id, where, call_findings("gold", Calls.of(calls), dialogue.tools))
        for decision in _decisions(checkup, dialogue, tokenizer, where):
            if not report.counts["decisions"]:
                check_template(decision, tokenizer)
            report.counts["decisions"] += 1
            checkup.measure(len(decision.prompt_ids), [len(decision.gold_ids)])
            checkup.tokens.update(class_counts(tree_classes(_gold_tree(decision), tokenizer)))
            length = len(decision.prompt_ids) + len(decision.gold_ids)
            if max_length is not None and length > max_length:
                report.drop(decision.id, where, "over max_length", f"{length} tokens, max_length is {max_length}")
    if not report.counts["calls"] and not checkup.errors:
        checkup.errors.append(f"{path}: no dialogue calls a tool, so there is no gold answer to compare with")


def _where(origin: dict[str, Any], path: Path) -> str:
    """The row that something comes from, where it was read from one of this file."""
    here = origin.get("file") == path.name and "line" in origin
    return f"{path}:{origin['line']}" if here else str(path)


def _decisions(checkup: Checkup, dialogue: Dialogue, tokenizer: Any, where: str) -> list[Decision]:
    try:
        return decisions(dialogue, tokenizer)
    except InputError as error:
        checkup.errors.append(f"{where}: {error}")
        return []


def _gold_tree(decision: Decision) -> PreferenceTree:
    nodes, leaves = merge_completions([Completion(decision.gold_ids, Leaf(-1, "gold"))])
    return PreferenceTree(decision.id, decision.prompt_ids, nodes, leaves, pairs=[], tools=decision.tools)


def _check_benchmark(checkup: Checkup, path: Path, row_format: RowFormat) -> None:
    report = checkup.report = DataReport(path=str(path), format=row_format.name, kind="rows")
    report.note("a benchmark, on which nothing may be trained")
    for line, row in iterate_rows(path, on_error=lambda e: checkup.errors.append(str(e))) if path.is_file() else ():
        report.read += 1
        place = Place(path, line)
        try:
            report.kept += row_format.read(row, place, report) is not None
        except InputError as error:
            checkup.errors.append(f"{place}: {error}")
    if row_format is BFCL and not checkup.errors:
        _, checkup.report = read_benchmark(path)  # with the possible answers
        checkup.report.notes = report.notes


def _reads_calls(tokenizer: Any, report: DataReport) -> bool:
    """Whether calls can be read from the text of an answer; training goes on without."""
    readable = find_dialect(tokenizer) is not None
    if not readable:
        report.note("calls in texts are not checked: the chat template writes none that can be read (--dialect)")
    return readable


def _shown(items: list[Any], path: Path) -> Iterator[Any]:
    """The items, with a bar in a terminal."""
    return iter(tqdm(items, desc=path.name, disable=None, leave=False))
