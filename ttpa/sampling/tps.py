"""Token-level preference sampling: decode every decision, fork the answer where the model hesitates, score all ends."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from ttpa.data.dialogues import Dialogue
from ttpa.esm.errors import Score
from ttpa.esm.pairs import strict_pairs
from ttpa.esm.score import score_tokens
from ttpa.sampling.decisions import Decision, all_decisions
from ttpa.sampling.decode import Decoded, Fork, Trunks, batches, decode, end_ids
from ttpa.sampling.forks import fork_places, token_fields
from ttpa.sampling.options import SamplingOptions
from ttpa.sampling.report import SamplingReport
from ttpa.tools.call import Call
from ttpa.tools.hermes import parse
from ttpa.tools.tokens import completion_text
from ttpa.trees.record import Completion, Leaf, PreferenceTree, merge_completions


def sample_trees(
    model: PreTrainedModel,
    tokenizer: Any,
    dialogues: Iterable[Dialogue],
    *,
    options: SamplingOptions | None = None,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[PreferenceTree], SamplingReport]:
    """Sample one preference tree for every decision of the dialogues, and say what came of it.

    A tree holds the model's answers (rule `options.rule`), the gold answer, their strict ESM scores and errors, and a
    pair of an exact answer over every wrong one. Answers that say the same as an earlier one are dropped; so is a tree
    without a pair. Trees stand in the order of the decisions; decisions whose prompt and gold answer have more than
    `max_length` tokens (None: any number) are left out and reported. `progress` is told the decisions done and in all
    after every batch. Equal arguments give equal trees up to float rounding; the model keeps its mode. Raises
    InputError for what the chat template refuses.
    """
    options = options or SamplingOptions()
    began = time.perf_counter()
    found = all_decisions(dialogues, tokenizer, max_length=max_length)
    report = SamplingReport(decisions=len(found), exact_trunks=0 if options.rule == "tps" else None)
    usable, gold = [], []
    for decision in found:
        answer = _completion(tokenizer, decision, "gold", decision.gold_ids, "stop")
        if decision.dropped is not None:
            report.drop(decision.id, decision.dropped)
        elif answer.leaf.score != 1.0:
            report.drop(decision.id, "the gold answer is not exact when it is read back")
        else:
            usable.append(decision)
            gold.append(answer)
    origin = _origin(model, tokenizer, options)
    trees: dict[int, PreferenceTree] = {}
    done = 0
    for rows in batches([len(decision.prompt_ids) for decision in usable], options.batch_size):
        chosen = [usable[i] for i in rows]
        sample = _tps if options.rule == "tps" else _release
        for i, answers in zip(rows, sample(model, tokenizer, chosen, options, report), strict=True):
            tree = _tree(usable[i], answers, gold[i], origin, report)
            if tree is not None:
                trees[i] = tree
        done += len(rows)
        if progress is not None:
            progress(done, len(usable))
    report.seconds = time.perf_counter() - began
    return [trees[i] for i in sorted(trees)], report


def _tps(
    model: PreTrainedModel,
    tokenizer: Any,
    decisions: list[Decision],
    options: SamplingOptions,
    report: SamplingReport,
) -> Iterator[list[Completion]]:
    """The trunk of each decision and its branches."""
    prompts = [decision.prompt_ids for decision in decisions]
    trunks = Trunks(model, prompts, ends=end_ids(model, tokenizer), max_new_tokens=options.max_new_tokens)
    forks: list[Fork] = []
    logps: list[float] = []
    for row, (decision, trunk) in enumerate(zip(decisions, trunks.decoded, strict=True)):
        report.decoded_tokens += len(trunk.ids)
        fields = token_fields(tokenizer, trunk.ids, decision.tools)
        for place in fork_places(trunk, fields, options=options):
            report.forks[place.field] += 1
            forks += [Fork(row, place.at, token) for token, _ in place.alternatives]
            logps += [math.log(p) for _, p in place.alternatives]
    answers = [
        [_completion(tokenizer, decision, "trunk", trunk.ids, trunk.finish, trunk.logps, trunk.entropy)]
        for decision, trunk in zip(decisions, trunks.decoded, strict=True)
    ]
    assert report.exact_trunks is not None
    report.exact_trunks += sum(trunk.leaf.score == 1.0 for (trunk,) in answers)
    for fork, logp, rest in zip(forks, logps, trunks.branch(forks, batch_size=options.batch_size), strict=True):
        report.decoded_tokens += len(rest.ids)
        trunk, at = trunks.decoded[fork.row], fork.at
        answers[fork.row].append(
            _completion(
                tokenizer,
                decisions[fork.row],
                "branch",
                [*trunk.ids[:at], fork.token, *rest.ids],
                rest.finish,
                [*trunk.logps[:at], logp, *rest.logps],
                [*trunk.entropy[: at + 1], *rest.entropy],
            )
        )
    yield from answers


def _release(
    model: PreTrainedModel,
    tokenizer: Any,
    decisions: list[Decision],
    options: SamplingOptions,
    report: SamplingReport,
) -> Iterator[list[Completion]]:
    """Independent samples of each decision. The seed of a sample depends on nothing but its decision and number."""
    names = [f"{options.seed} {decision.id} {i}" for decision in decisions for i in range(options.num_samples)]
    samples = decode(
        model,
        [decision.prompt_ids for decision in decisions for _ in range(options.num_samples)],
        ends=end_ids(model, tokenizer),
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seeds=[int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") for name in names],
    )
    for i, decision in enumerate(decisions):
        drawn: list[Decoded] = samples[i * options.num_samples : (i + 1) * options.num_samples]
        report.decoded_tokens += sum(len(sample.ids) for sample in drawn)
        yield [_completion(tokenizer, decision, "branch", s.ids, s.finish, s.logps, s.entropy) for s in drawn]


def _completion(
    tokenizer: Any,
    decision: Decision,
    kind: str,
    ids: list[int],
    finish: str,
    logps: list[float] | None = None,
    entropy: list[float] | None = None,
) -> Completion:
    """A scored answer."""
    score: Score = score_tokens(tokenizer, ids, decision.calls, decision.tools)
    text, _ = completion_text(tokenizer, ids)
    calls = [
        Call(call.name, call.arguments).to_dict()
        for call in parse(text).calls
        if call.name is not None and call.arguments is not None
    ]
    errors = [error.to_leaf() for error in score.errors]
    return Completion(ids, Leaf(-1, kind, finish, calls, score.score, errors), logps, entropy)


def _tree(
    decision: Decision,
    answers: list[Completion],
    gold: Completion,
    origin: dict[str, Any],
    report: SamplingReport,
) -> PreferenceTree | None:
    """The tree of different answers and gold, None where no answer is wrong."""
    different: dict[Any, Completion] = {}
    for answer in answers:
        if different.setdefault(_meaning(answer), answer) is not answer:
            report.duplicates += 1
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


def _origin(model: PreTrainedModel, tokenizer: Any, options: SamplingOptions) -> dict[str, Any]:
    return {
        "model": model.config.name_or_path,
        "template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16],
        "sampling": asdict(options),
        "versions": {name: _version(name) for name in ("ttpa", "torch", "transformers")},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"
