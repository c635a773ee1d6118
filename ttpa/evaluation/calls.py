"""How many tool calls a model gets right: one greedy answer at every decision, scored by the strict ESM."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ttpa.data.decisions import Decision, all_decisions
from ttpa.data.dialogues import Dialogue
from ttpa.esm.score import score_tokens
from ttpa.evaluation.intervals import wilson
from ttpa.sampling.decoded import Decoded
from ttpa.sampling.options import SamplingOptions
from ttpa.sampling.paths import PathWriter
from ttpa.sampling.report import SamplingReport


@dataclass(frozen=True)
class Outcome:
    """What a model did at one decision: `score` is its strict ESM score, 1.0 where the calls are exact, `codes` the
    codes of its errors, `finish` is stop or length, `tokens` the number of tokens it wrote."""

    id: str
    split: str
    score: float
    codes: list[str]
    finish: str
    tokens: int

    @property
    def exact(self) -> bool:
        """Whether the answer has no error."""
        return not self.codes


@dataclass
class Evaluation:
    """The outcomes of a model at the decisions of some dialogues, in their order, and the decisions left out."""

    outcomes: list[Outcome]
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def exact(self) -> int:
        """The number of decisions at which the calls are exact."""
        return sum(outcome.exact for outcome in self.outcomes)

    @property
    def score(self) -> float:
        """The mean ESM score, nan where nothing was evaluated."""
        return math.fsum(o.score for o in self.outcomes) / len(self.outcomes) if self.outcomes else math.nan

    @property
    def errors(self) -> dict[str, int]:
        """The number of errors by code, the most frequent first."""
        counts = Counter(code for outcome in self.outcomes for code in outcome.codes)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def splits(self) -> dict[str, Evaluation]:
        """The evaluation of each split (`source["split"]` of the dialogues) in the order of their first decision."""
        parts: dict[str, Evaluation] = {}
        for outcome in self.outcomes:
            parts.setdefault(outcome.split, Evaluation([])).outcomes.append(outcome)
        return parts

    def to_dict(self) -> dict[str, Any]:
        """The summary as one JSON object; shares and intervals lie in [0, 1], None where nothing was evaluated. With
        several splits, `splits` holds the summary of each."""
        number = len(self.outcomes)
        record: dict[str, Any] = {
            "decisions": number,
            "exact_calls": self.exact,
            "exact_share": self.exact / number if number else None,
            "exact_interval": list(wilson(self.exact, number)) if number else None,
            "esm_score": self.score if number else None,
            "errors": self.errors,
            "cut_off": sum(outcome.finish == "length" for outcome in self.outcomes),
            "decoded_tokens": sum(outcome.tokens for outcome in self.outcomes),
            "dropped": dict(Counter(self.dropped.values())),
        }
        parts = self.splits()
        if len(parts) > 1:
            record["splits"] = {name: part.to_dict() for name, part in parts.items()}
        return record


def evaluate_calls(
    model: PreTrainedModel,
    tokenizer: Any,
    dialogues: Iterable[Dialogue],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 256,
    max_length: int | None = None,
) -> Evaluation:
    """Let a model answer greedily at every decision of the dialogues and score each answer with the strict ESM.

    `batch_size` rows are decoded at once, each for at most `max_new_tokens` tokens. Decisions whose prompt and gold
    answer have more than `max_length` tokens are left out and listed in `dropped`. The model keeps its mode. Raises
    InputError for what the chat template refuses.
    """
    found = all_decisions(dialogues, tokenizer, max_length=max_length)
    usable = [decision for decision in found if decision.dropped is None]
    answers = greedy_answers(model, tokenizer, usable, batch_size=batch_size, max_new_tokens=max_new_tokens)
    outcomes = []
    for decision, answer in zip(usable, answers, strict=True):
        score = score_tokens(tokenizer, answer.ids, decision.calls, decision.tools)
        codes = [error.code for error in score.errors]
        split = str(decision.source.get("split", "all"))
        outcomes.append(Outcome(decision.id, split, score.score, codes, answer.finish, len(answer.ids)))
    return Evaluation(outcomes, {d.id: d.dropped for d in found if d.dropped is not None})


def greedy_answers(
    model: PreTrainedModel, tokenizer: Any, decisions: Sequence[Decision], *, batch_size: int, max_new_tokens: int
) -> list[Decoded]:
    """What a model writes greedily at each decision, `batch_size` answers at once, each of at most `max_new_tokens`
    tokens. Raises InputError as `PathWriter` does."""
    options = SamplingOptions(num_forks=0, max_new_tokens=max_new_tokens, rows=batch_size)
    writer = PathWriter(model, tokenizer, decisions, options=options)
    answers = dict(writer.write(decisions, report=SamplingReport()))
    return [answer for i in range(len(decisions)) for _, answer in answers[i]]
