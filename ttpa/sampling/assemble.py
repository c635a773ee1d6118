"""From the answers to one decision to a scored preference tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ttpa.data.decisions import Decision
from ttpa.esm.errors import Score
from ttpa.esm.pairs import strict_pairs
from ttpa.esm.score import score_tokens
from ttpa.sampling.decoded import Decoded
from ttpa.sampling.report import SamplingReport
from ttpa.tools.call import Call
from ttpa.tools.completion import read_completion
from ttpa.trees.record import Completion, Leaf, PreferenceTree, merge_completions


def scored(
    tokenizer: Any, decision: Decision, kind: str, ids: list[int], finish: str, decoded: Decoded | None = None
) -> Completion:
    """An answer with its calls, its strict ESM score and its errors; `decoded` is None where nobody decoded it."""
    score: Score = score_tokens(tokenizer, ids, decision.calls, decision.tools)
    turn, _ = read_completion(tokenizer, ids, decision.tools)
    calls = [
        Call(call.name, call.arguments).to_dict()
        for call in turn.calls
        if call.name is not None and call.arguments is not None
    ]
    leaf = Leaf(-1, kind, finish, calls, score.score, [error.to_leaf() for error in score.errors])
    if decoded is None:
        return Completion(ids, leaf)
    return Completion(ids, leaf, decoded.logps, decoded.entropy)


def paths_to_tree(
    tokenizer: Any,
    decision: Decision,
    paths: Sequence[tuple[str, Decoded]],
    *,
    gold: Completion,
    origin: dict[str, Any],
    report: SamplingReport,
) -> PreferenceTree | None:
    """The tree of different answers and gold, None where none of them is wrong.

    `paths` are the names of the paths and what was decoded, trunk before branches; of answers that make the same calls
    with the same errors the first is kept. Counts answers and pairs in `report`.
    """
    different: dict[Any, Completion] = {}
    for name, decoded in paths:
        kind = "trunk" if name == "trunk" else "branch"
        answer = scored(tokenizer, decision, kind, decoded.ids, decoded.finish, decoded)
        if kind == "trunk":
            report.exact_trunks = (report.exact_trunks or 0) + (answer.leaf.score == 1.0)
        if different.setdefault(_meaning(answer), answer) is not answer:
            report.duplicates += 1
        report.incomplete_draws += not decoded.complete
    completions = list(different.values())
    if all(answer.ids != gold.ids for answer in completions):
        completions.append(gold)
    nodes, leaves = merge_completions(completions)
    pairs = strict_pairs(leaves)
    if not pairs:
        report.without_pair += 1
        return None
    report.trees += 1
    report.pairs += len(pairs)
    report.leaves += len(leaves)
    return PreferenceTree(
        id=decision.id,
        prompt_ids=decision.prompt_ids,
        nodes=nodes,
        leaves=leaves,
        pairs=pairs,
        dialogue=decision.dialogue,
        turn=decision.turn,
        tools=decision.tools,
        messages=decision.messages,
        origin=origin,
    )


def _meaning(answer: Completion) -> Any:
    """Equal for answers that make the same calls with the same errors; answers without a call differ by their ids."""
    if not answer.leaf.calls:
        return tuple(answer.ids)
    errors = tuple((error["code"], error["call"], error["pointer"]) for error in answer.leaf.errors)
    return tuple(Call(call["name"], call["arguments"]).normal() for call in answer.leaf.calls), errors
