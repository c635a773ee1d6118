"""A small benchmark in the files of BFCL."""

from __future__ import annotations

import json
from pathlib import Path

AREA = {
    "name": "math.area",
    "description": "Area.",
    "parameters": {
        "type": "dict",
        "properties": {"base": {"type": "float"}, "unit": {"type": "string"}, "note": {"type": "any"}},
        "required": ["base"],
    },
}
ANSWER = [{"math.area": {"base": [2.0], "unit": ["", "m"], "note": ["", "A-B"]}}]


def question(id: str, **changes) -> dict:
    return {"id": id, "question": [[{"role": "user", "content": "Area of 2?"}]], "function": [AREA], **changes}


def write(file, *rows: dict) -> None:
    """As BFCL's files are: lines of JSON in a .json file, without an end of line at the end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, rows)))


def write_benchmark(folder: Path) -> Path:
    """Five questions of four categories, with possible answers where they have some."""
    files = {"simple_python": ["simple_python_0", "simple_python_1"], "live_multiple": ["live_multiple_0-0-0"]}
    for name, ids in files.items():
        write(folder / f"BFCL_v4_{name}.json", *map(question, ids))
        gold = [{"id": id, "ground_truth": ANSWER} for id in ids]
        write(folder / "possible_answer" / f"BFCL_v4_{name}.json", *gold)
    write(folder / "BFCL_v4_irrelevance.json", question("irrelevance_0"))
    write(folder / "BFCL_v4_live_relevance.json", question("live_relevance_0-0-0"))
    return folder
