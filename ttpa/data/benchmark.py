"""BFCL's single-turn Python categories: the questions with their possible answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttpa.data.dialogues import Dialogue
from ttpa.data.formats.bfcl import BFCL, category_of
from ttpa.data.formats.format import Place
from ttpa.data.jsonl import read_json_lines
from ttpa.data.report import DataReport
from ttpa.data.rows import iterate_rows
from ttpa.errors import InputError
from ttpa.esm.score import score_call

NON_LIVE = ("simple", "simple_python", "multiple", "parallel", "parallel_multiple")
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
WITHOUT_CALL = ("irrelevance", "live_irrelevance")
ANY_CALL = ("live_relevance",)
CATEGORIES = (*NON_LIVE, *LIVE, *WITHOUT_CALL, *ANY_CALL)
"""The categories that can be judged; `simple` is what releases before v4 call simple_python."""

ANSWERS = "possible_answer"


@dataclass(frozen=True)
class Question:
    """A question as a dialogue without an answer; `functions` are its tools as BFCL writes them, `answers` BFCL's
    alternatives for every call, empty where no call is expected."""

    dialogue: Dialogue
    category: str
    functions: list[dict[str, Any]]
    answers: list[dict[str, Any]]


def read_benchmark(path: Path) -> tuple[list[Question], DataReport]:
    """The questions of a BFCL file, or of all *.json below a folder, with their possible answers out of the folder
    `possible_answer` that lies in the folder of the questions or beside it. Files of a folder in another category are
    listed in the report and left out. Raises InputError for a file in another category, a folder without any that can
    be judged, questions without an answer, and whatever of both the reader or the checker refuses."""
    report = DataReport(path=str(path), format="bfcl", kind="questions")
    questions: dict[str, Question] = {}
    for file in _question_files(path, report):
        answers = _read_answers(file)
        for line, row in iterate_rows(file):
            report.read += 1
            try:
                question = _question(row, Place(file, line), answers, report)
                if question.dialogue.id in questions:
                    raise InputError(f"the id {question.dialogue.id!r} comes twice")
            except InputError as error:
                raise InputError(str(error), path=file, line=line) from None
            questions[question.dialogue.id] = question
    if not questions:
        raise InputError(f"no BFCL questions to judge; the categories are {', '.join(CATEGORIES)}", path=path)
    report.kept = len(questions)
    return list(questions.values()), report


def _question_files(path: Path, report: DataReport) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for file in sorted(path.rglob("*.json")):
        if ANSWERS in file.relative_to(path).parts:
            continue
        _, first = next(iterate_rows(file), (0, {}))
        category = category_of(str(first.get("id", "")))
        if category in CATEGORIES and "question" in first:
            yield file
        else:
            report.drop(file.stem, str(file), "file of another kind", category)


def _read_answers(file: Path) -> dict[str, list[Any]] | None:
    """The possible answers to the questions of a file by their ids, None where there is no file of them."""
    places = [folder / ANSWERS / file.name for folder in (file.parent, file.parent.parent)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        return None
    answers = {}
    for line, row in read_json_lines(found):
        if not isinstance(row.get("id"), str) or not isinstance(row.get("ground_truth"), list):
            raise InputError("a possible answer has id and ground_truth, a list", path=found, line=line)
        answers[row["id"]] = row["ground_truth"]
    return answers


def _question(row: dict[str, Any], place: Place, answers: dict[str, list[Any]] | None, report: DataReport) -> Question:
    dialogue = BFCL.read(row, place, report)
    assert isinstance(dialogue, Dialogue)
    category, functions, gold = dialogue.source["category"], dialogue.source["functions"], []
    if category not in CATEGORIES:
        raise InputError(f"the category {category!r} cannot be judged; the categories are {', '.join(CATEGORIES)}")
    if category not in (*WITHOUT_CALL, *ANY_CALL):
        if answers is None or dialogue.id not in answers:
            raise InputError(
                f"no possible answer to {dialogue.id!r}: it stands in a file of the same name in a folder {ANSWERS}, "
                "in the folder of the questions or beside it"
            )
        gold = answers[dialogue.id]
        if not gold:
            raise InputError(f"the possible answer to {dialogue.id!r} has no call")
    score_call([], gold, functions, preset="bfcl")  # what the checker refuses, it refuses before an answer is written
    return Question(dialogue, category, functions, gold)
