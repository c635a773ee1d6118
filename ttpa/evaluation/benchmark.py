"""BFCL's single-turn Python categories: one greedy answer to every question, judged by the rules of BFCL's checker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel

from ttpa.data.benchmark import ANY_CALL, LIVE, NON_LIVE, Question
from ttpa.data.decisions import Decision, check_template
from ttpa.errors import InputError
from ttpa.esm.bfcl import bfcl
from ttpa.evaluation.calls import Evaluation, Outcome, greedy_answers
from ttpa.evaluation.compare import evaluation_table
from ttpa.tools.completion import read_completion


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
    answers = greedy_answers(model, tokenizer, asked, batch_size=batch_size, max_new_tokens=max_new_tokens)
    outcomes = []
    for (question, _), answer in zip(usable, answers, strict=True):
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
