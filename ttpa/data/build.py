"""From rendered completions to a preference tree that is fit for training, or to a line in the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ttpa.data.messages import Message, calls_of, functions_of
from ttpa.data.render import Rendered, Unwritable, render_messages, render_texts
from ttpa.data.report import DataReport
from ttpa.errors import InputError
from ttpa.esm.score import score_tokens
from ttpa.tools.call import call_from_message
from ttpa.tools.dialects.detect import find_dialect
from ttpa.trees.record import Completion, Leaf, Pair, PreferenceTree, merge_completions

OnOverlength = Literal["error", "drop"]


@dataclass(frozen=True)
class Limits:
    """How long a path through a tree may be in tokens (None: any length), and what happens to one that is longer."""

    max_length: int | None
    on_overlength: OnOverlength = "drop"

    def keep(self, tree: PreferenceTree, where: str, report: DataReport) -> bool:
        """Whether the tree fits; one that does not is listed in the report, or raises InputError under "error"."""
        longest = max(len(tree.completion_ids(leaf)) for leaf in range(len(tree.leaves)))
        length = len(tree.prompt_ids) + longest
        if self.max_length is None or length <= self.max_length:
            return True
        if self.on_overlength == "error":
            raise InputError(
                f"{tree.id!r} has {length} tokens, more than max_length {self.max_length}; "
                "raise max_length or set on_overlength to drop"
            )
        report.drop(tree.id, where, "over max_length", f"{length} tokens, max_length is {self.max_length}")
        return False


@dataclass(frozen=True)
class Example:
    """One prompt, the completion to prefer and those that it is preferred to: texts, or checked messages."""

    id: str
    where: str
    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: list[Any]
    tools: list[dict[str, Any]]
    template_kwargs: dict[str, Any]
    origin: dict[str, Any]


def build_tree(example: Example, *, tokenizer: Any, limits: Limits, report: DataReport) -> PreferenceTree | None:
    """The tree of an example, its sides split at the first token in which they differ; rejected completions equal to
    the chosen one, messages that the chat template cannot write, and trees over the limit are listed in the report, and
    None is returned when nothing is left. Where the sides are single turns with calls, leaves get the scores and errors
    of the strict ESM, the chosen side being gold. Raises InputError for what the tokenizer and its chat template
    refuse."""
    sides = [example.chosen, *example.rejected]
    rendered: Rendered
    if isinstance(example.prompt, str):
        rendered = render_texts(tokenizer, example.prompt, sides)
    else:
        try:
            rendered = render_messages(
                tokenizer, example.prompt, sides, tools=example.tools, template_kwargs=example.template_kwargs
            )
        except Unwritable as error:
            report.drop(example.id, example.where, "the chat template cannot write it", str(error))
            return None
    for repair, detail in rendered.repairs:
        report.repair(example.id, example.where, repair, detail)
    if rendered.moved:
        detail = f"{rendered.moved} tokens"
        report.repair(example.id, example.where, "prompt cut where prompt and completion merge", detail)
    completions: list[Completion] = []
    for side, ids, trained in zip(sides, rendered.completions, rendered.trained, strict=True):
        if any(ids == earlier.ids for earlier in completions):
            report.drop(example.id, example.where, "identical", "two completions have the same tokens")
            continue
        calls = [] if isinstance(side, str) else calls_of(side)
        completions.append(Completion(ids, Leaf(node=-1, kind="given", calls=calls), trained=trained))
    if len(completions) < 2:
        return None
    nodes, leaves = merge_completions(completions)
    tree = PreferenceTree(
        id=example.id,
        prompt_ids=rendered.prompt_ids,
        nodes=nodes,
        leaves=leaves,
        pairs=[Pair(chosen=0, rejected=leaf) for leaf in range(1, len(leaves))],
        tools=example.tools,
        messages=[] if isinstance(example.prompt, str) else example.prompt,
        origin=example.origin,
    )
    if not limits.keep(tree, example.where, report):
        return None
    _find_errors(tree, sides, tokenizer, report)
    return tree


def _find_errors(tree: PreferenceTree, sides: list[Any], tokenizer: Any, report: DataReport) -> None:
    """Score the rejected sides with the chosen one as gold, where all are single turns of which one makes calls, and
    the chosen one is exact when it is read back. Without that nothing is known of where a side goes wrong."""
    turns = [side[0] for side in sides if not isinstance(side, str) and len(side) == 1]
    if len(turns) < len(sides) or not any(map(functions_of, turns)) or find_dialect(tokenizer) is None:
        return
    try:
        gold = [call_from_message(function) for function in functions_of(turns[0])]
        scores = [score_tokens(tokenizer, tree.completion_ids(0), gold, tree.tools)]
        if scores[0].errors:
            report.count("chosen sides that are not exact when they are read back")
            return
        for leaf in range(1, len(tree.leaves)):
            scores.append(score_tokens(tokenizer, tree.completion_ids(leaf), gold, tree.tools))
    except InputError as error:
        report.note(f"errors are not looked for in every row: {error}")
        return
    for side, score in zip(tree.leaves, scores, strict=True):
        side.score, side.errors = score.score, [found.to_leaf() for found in score.errors]
    for pair in tree.pairs:
        pair.margin = scores[pair.chosen].score - scores[pair.rejected].score
        report.count("rejected sides with errors" if scores[pair.rejected].errors else "rejected sides without errors")
