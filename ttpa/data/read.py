"""One door to data: whatever format a path holds, trees or dialogues and a report come out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from ttpa.data.build import Example, Limits, OnOverlength, build_tree
from ttpa.data.dialogues import Dialogue
from ttpa.data.formats import FORMATS
from ttpa.data.formats.format import Place, RowFormat
from ttpa.data.report import DataReport
from ttpa.data.rows import iterate_rows
from ttpa.data.toolbench import AS_IN_TP_LLAMA, ToolBenchOptions, read_toolbench
from ttpa.errors import InputError, OnError
from ttpa.trees.io import iterate_trees
from ttpa.trees.record import PreferenceTree

Kind = Literal["trees", "toolbench", "dialogues", "preferences", "evaluation"]


def kind_of(path: Path) -> tuple[Kind, RowFormat | None]:
    """What a path holds, which shows in its first record: our trees, ToolBench answers, or rows of one of FORMATS; a
    folder holds ToolBench answers unless the first file that can be read is a benchmark. Raises InputError for a path
    that does not exist, an empty or broken file, and other records."""
    if path.is_dir():
        for file in sorted(path.rglob("*.json")):
            with contextlib.suppress(InputError):  # the reader will say it, of the file
                kind, row_format = kind_of(file)
                return (kind, row_format) if kind == "evaluation" else ("toolbench", None)
        return "toolbench", None
    for _, first in iterate_rows(path):
        if "prompt_ids" in first and "nodes" in first:
            return "trees", None
        if "tree" in first and "answer_generation" in first:
            return "toolbench", None
        for row_format in FORMATS:
            if row_format.matches(first):
                return row_format.kind, row_format
        known = "; ".join(f"{row_format.name} ({row_format.columns})" for row_format in FORMATS)
        found = ", ".join(first) or "none"
        raise InputError(f"rows of an unknown format; columns found: {found}; known: {known}", path=path)
    raise InputError("the file is empty", path=path)


def read_data(
    path: Path | str,
    *,
    tokenizer: Any,
    max_length: int | None,
    on_overlength: OnOverlength = "drop",
    toolbench: ToolBenchOptions = AS_IN_TP_LLAMA,
    on_error: OnError | None = None,
) -> tuple[list[PreferenceTree], DataReport]:
    """Preference trees from a file of trees, a file of preferences in one of FORMATS (.jsonl, .json, .parquet), or a
    ToolBench answer file or folder of them, read as `toolbench` says. A tree with a path of more than `max_length`
    tokens (None: no limit) is left out and listed in the report, or raises under "error". Raises InputError (file:line)
    for what `kind_of` refuses, for data that holds no preferences, and for rows that the reader refuses; these go to
    `on_error` instead where it is given, and the next row is read.
    """
    path, limits = Path(path), Limits(max_length, on_overlength)
    kind, row_format = kind_of(path)
    if kind == "trees":
        return read_tree_file(path, limits=limits, on_error=on_error)
    if row_format is None:
        return read_toolbench(path, tokenizer=tokenizer, limits=limits, options=toolbench, on_error=on_error)
    if kind != "preferences":
        raise InputError(_NO_PREFERENCES[kind], path=path)
    report = DataReport(path=str(path), format=row_format.name)
    trees = []
    examples = _examples(_read_rows(path, row_format, report, on_error))
    for place, example in examples if row_format.gather is None else row_format.gather(examples, report):
        try:
            tree = build_tree(example, tokenizer=tokenizer, limits=limits, report=report)
        except InputError as error:
            _refused(error, place, on_error)
        else:
            trees += [] if tree is None else [tree]
    report.kept = len(trees)
    return trees, report


def read_dialogues(path: Path | str, *, on_error: OnError | None = None) -> tuple[list[Dialogue], DataReport]:
    """All dialogues of a file in their order, and the report. Raises InputError (file:line) for what `kind_of` refuses,
    for rows that are no dialogues, an id that comes twice and a file without dialogues; rows that the reader refuses go
    to `on_error` instead where it is given."""
    path = Path(path)
    if path.is_dir():
        raise InputError("dialogues are read from a file; this is a folder without questions of BFCL", path=path)
    kind, row_format = kind_of(path)
    if row_format is None or kind != "dialogues":
        raise InputError(f"the file holds {kind}, not dialogues", path=path)
    report = DataReport(path=str(path), format=row_format.name, kind="dialogues")
    dialogues: list[Dialogue] = []
    lines: dict[str, int] = {}
    for place, dialogue in _read_rows(path, row_format, report, on_error):
        assert isinstance(dialogue, Dialogue)
        if dialogue.id in lines:
            _refused(InputError(f"the id {dialogue.id!r} is already on line {lines[dialogue.id]}"), place, on_error)
            continue
        lines[dialogue.id] = place.line
        dialogues.append(dialogue)
    if not dialogues and on_error is None:
        raise InputError("the file holds no dialogue", path=path)
    report.kept = len(dialogues)
    return dialogues, report


def read_tree_file(
    path: Path, *, limits: Limits, on_error: OnError | None = None
) -> tuple[list[PreferenceTree], DataReport]:
    """Our own trees, without those over the limit; raises InputError, or calls `on_error`, as
    `ttpa.trees.io.iterate_trees` does."""
    report = DataReport(path=str(path), format="trees", unit="trees")
    trees = []
    for tree in iterate_trees(path, on_error=on_error):
        report.read += 1
        try:
            if limits.keep(tree, str(path), report):
                trees.append(tree)
        except InputError as error:
            raise InputError(str(error), path=path) from None
    report.kept = len(trees)
    return trees, report


_NO_PREFERENCES = {
    "dialogues": "a file of dialogues holds no preferences; make trees of it with `python -m ttpa.sample`",
    "evaluation": "this is a benchmark, on which nothing may be trained; `python -m ttpa.evaluate` takes BFCL's",
}


def _read_rows(
    path: Path, row_format: RowFormat, report: DataReport, on_error: OnError | None
) -> Iterator[tuple[Place, Dialogue | Example]]:
    for line, row in iterate_rows(path, on_error=on_error):
        report.read += 1
        place = Place(path, line)
        try:
            found = row_format.read(row, place, report)
        except InputError as error:
            _refused(error, place, on_error)
        else:
            if found is not None:
                yield place, found


def _examples(rows: Iterable[tuple[Place, Dialogue | Example]]) -> Iterator[tuple[Place, Example]]:
    for place, example in rows:
        assert isinstance(example, Example)
        yield place, example


def _refused(error: InputError, place: Place, on_error: OnError | None) -> None:
    located = InputError(str(error), path=place.path, line=place.line)
    if on_error is None:
        raise located from None
    on_error(located)
