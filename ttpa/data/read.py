"""One door to training data: whatever format a path holds, preference trees and a report come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ttpa.data.build import Limits, OnOverlength
from ttpa.data.preference import iterate_rows, read_preferences
from ttpa.data.report import DataReport
from ttpa.data.toolbench import read_toolbench
from ttpa.errors import InputError
from ttpa.trees.io import iterate_trees
from ttpa.trees.record import PreferenceTree


def read_data(
    path: Path | str, *, tokenizer: Any, max_length: int | None, on_overlength: OnOverlength = "drop"
) -> tuple[list[PreferenceTree], DataReport]:
    """Preference trees from a file of trees, a TRL preference file (.jsonl, .json, .parquet), or a ToolBench answer
    file or folder of them; what it is shows in the first record. A tree with a path of more than `max_length` tokens
    (None: no limit) is left out and listed in the report, or raises under "error". Raises InputError (file:line) for a
    path that does not exist, an empty or broken file, a record of another kind, and rows that the reader refuses.
    """
    path, limits = Path(path), Limits(max_length, on_overlength)
    if path.is_dir():
        return read_toolbench(path, tokenizer=tokenizer, limits=limits)
    first = _first_record(path)
    if "prompt_ids" in first and "nodes" in first:
        return read_tree_file(path, limits=limits)
    if "tree" in first and "answer_generation" in first:
        return read_toolbench(path, tokenizer=tokenizer, limits=limits)
    if "messages" in first and "chosen" not in first:
        problem = "a file of dialogues holds no preferences; make trees of it with `python -m ttpa.sample`"
        raise InputError(problem, path=path)
    return read_preferences(path, tokenizer=tokenizer, limits=limits)


def read_tree_file(path: Path, *, limits: Limits) -> tuple[list[PreferenceTree], DataReport]:
    """Our own trees, without those over the limit; raises InputError as `ttpa.trees.io.iterate_trees` does."""
    report = DataReport(path=str(path), format="trees", unit="trees")
    trees = []
    for tree in iterate_trees(path):
        report.read += 1
        try:
            if limits.keep(tree, str(path), report):
                trees.append(tree)
        except InputError as error:
            raise InputError(str(error), path=path) from None
    report.kept = len(trees)
    return trees, report


def _first_record(path: Path) -> dict[str, Any]:
    for _, record in iterate_rows(path):
        return record
    raise InputError("the file is empty", path=path)
