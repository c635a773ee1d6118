"""ToolPreference (arXiv 2406.07115): step-wise pairs out of ToolBench's trees, as texts."""

from __future__ import annotations

from typing import Any

from ttpa.data.build import Example
from ttpa.data.formats.format import Place, RowFormat
from ttpa.data.report import DataReport
from ttpa.errors import InputError

COLUMNS = ("id", "category", "instruction", "input", "output")
STEPS = ("Thought:", "Action:")
NOTE = (
    "the calls of these rows are text (Thought, Action, Action Input) and so are their tools: nothing is known of the "
    "errors in them; the answer trees of ToolBench give such pairs as calls"
)


def read_row(row: dict[str, Any], place: Place, report: DataReport) -> Example | None:
    """The example of a row: `instruction` (the task and its tools) and `input` (the steps so far) are joined by a line
    end into the question of the user, as LLaMA-Factory does, and `output` has the better and the worse next step, each
    a text of Thought, Action and Action Input. Texts are taken as they are. A row with equal steps is listed and
    dropped. Raises InputError for a row of another shape."""
    id, where = str(row.get("id") or place.id), str(place)
    for name in row:
        if name not in COLUMNS:
            raise InputError(f"unknown column {name!r}: ToolPreference has {', '.join(COLUMNS)}")
    for name in ("instruction", "input"):
        if not isinstance(row.get(name), str):
            raise InputError(f"{name} must be text, not {row.get(name)!r:.80}")
    if not row["instruction"].strip():
        raise InputError("the instruction is empty, where the task and the tools stand")
    steps = row.get("output")
    if not isinstance(steps, list) or len(steps) != 2 or not all(isinstance(step, str) for step in steps):
        raise InputError(f"output must be two texts, the better step and the worse one, not {steps!r:.80}")
    for which, step in zip(("better", "worse"), steps, strict=True):
        if not any(line.strip().startswith(STEPS) for line in step.splitlines()):
            raise InputError(f"the {which} step has no line that starts with Thought: or Action:, found {step!r:.80}")
    report.note(NOTE)
    if steps[0] == steps[1]:
        report.drop(id, where, "identical", "both steps are equal")
        return None
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    chosen, rejected = ([{"role": "assistant", "content": step}] for step in steps)
    origin = place.origin("tool_preference")
    return Example(id, where, [{"role": "user", "content": question}], chosen, [rejected], [], {}, origin)


TOOL_PREFERENCE = RowFormat(
    "tool_preference",
    "preferences",
    columns="id, category, instruction, input, output",
    matches=lambda row: "category" in row and "instruction" in row and isinstance(row.get("output"), list),
    read=read_row,
)
