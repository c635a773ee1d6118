"""BFCL's single-turn Python categories: one greedy answer to every question, judged by the rules of BFCL's checker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ttpa.data.dialogues import Dialogue
from ttpa.data.formats.bfcl import BFCL, category_of
from ttpa.data.formats.format import Place
from ttpa.data.jsonl import read_json_lines
from ttpa.data.report import DataReport
from ttpa.data.rows import iterate_rows
from ttpa.errors import InputError
from ttpa.esm.bfcl import bfcl
from ttpa.esm.score import score_call
from ttpa.evaluation.calls import Evaluation, Outcome
from ttpa.evaluation.compare import evaluation_table
from ttpa.sampling.decisions import Decision, check_template
from ttpa.sampling.options import SamplingOptions
from ttpa.sampling.paths import PathWriter
from ttpa.sampling.report import SamplingReport
from ttpa.tools.completion import read_completion

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


def evaluate_benchmark(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Iterable[Question],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 256,
    max_length: int | None = None,
) -> Evaluation:
    """Let a model answer every question greedily and judge each answer by the preset `bfcl`, 1 or 0; in the irrelevance
    categories any call is wrong, in the relevance category any well-formed call is right. The split of an outcome is
    its category. Names of functions are not changed, dots stay. `batch_size` answers of at most `max_new_tokens` tokens
    are decoded at once; questions of more than `max_length` tokens are left out and listed in `dropped`. Raises
    InputError for a tokenizer without a chat template, and for one that refuses a question or drops its tools."""
    found = [(question, _decision(question, tokenizer, max_length)) for question in questions]
    usable = [(question, decision) for question, decision in found if decision.dropped is None]
    asked = [decision for _, decision in usable]
    for decision in [decision for decision in asked if decision.tools][:1]:
        check_template(decision, tokenizer)
    options = SamplingOptions(num_forks=0, max_new_tokens=max_new_tokens, rows=batch_size)
    answers = dict(PathWriter(model, tokenizer, asked, options=options).write(asked, report=SamplingReport()))
    outcomes = []
    for i, (question, _) in enumerate(usable):
        ((_, answer),) = answers[i]
        codes = judge(tokenizer, answer.ids, question)
        id, tokens = question.dialogue.id, len(answer.ids)
        outcomes.append(Outcome(id, question.category, float(not codes), codes, answer.finish, tokens))
    return Evaluation(outcomes, {d.dialogue: d.dropped for _, d in found if d.dropped is not None})


def judge(tokenizer: Any, ids: Sequence[int], question: Question) -> list[str]:
    """The codes of the errors in an answer, none where BFCL accepts it. The answer is read in the dialect of the
    tokenizer with the tools as JSON Schema has them, and judged with BFCL's own."""
    turn, _ = read_completion(tokenizer, ids, question.dialogue.tools)
    if question.category in ANY_CALL:
        return [error.code for error in turn.errors] if turn.calls else ["no_call"]
    return [error.code for error in bfcl(turn, question.answers, question.functions).errors]


def _decision(question: Question, tokenizer: Any, max_length: int | None) -> Decision:
    dialogue = question.dialogue
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("questions need a tokenizer with a chat template, and this one has none")
    try:
        text = tokenizer.apply_chat_template(
            dialogue.messages, tools=dialogue.tools or None, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a foreign program and may fail in any way
        problem = f"{type(error).__name__}: {error}"
        raise InputError(f"question {dialogue.id!r}: the chat template refuses it: {problem}") from error
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return Decision(
        dialogue=dialogue.id,
        turn=len(dialogue.messages),
        tools=dialogue.tools,
        messages=dialogue.messages,
        calls=[],
        prompt_ids=ids,
        gold_ids=[],
        source=dialogue.source,
        dropped="over max_length" if max_length is not None and len(ids) > max_length else None,
    )


def group_means(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """The share of right answers in the groups `non_live` (the plain mean of its categories) and `live` (weighted by
    questions), as BFCL takes the means but of the categories at hand alone, which `categories` names. They are no
    results of the leaderboard, whose groups hold Java and JavaScript as well."""
    splits = evaluation.splits()
    means: dict[str, dict[str, Any]] = {}
    for group, members in (("non_live", NON_LIVE), ("live", LIVE)):
        parts = {name: splits[name] for name in members if name in splits}
        if parts:
            weights = {name: len(part.outcomes) if group == "live" else 1 for name, part in parts.items()}
            total = sum(weights[name] * part.exact / len(part.outcomes) for name, part in parts.items())
            means[group] = {"mean": total / sum(weights.values()), "categories": list(parts)}
    return means


def benchmark_table(evaluation: Evaluation) -> str:
    """The text table of an evaluation, with the means of the groups below it."""
    means = [
        f"{group} mean of {', '.join(part['categories'])}: {100 * part['mean']:.1f} %"
        for group, part in group_means(evaluation).items()
    ]
    return "\n".join([evaluation_table(evaluation), *means])
