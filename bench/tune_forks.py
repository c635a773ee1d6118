"""What the fork rule finds: usable pairs for the tokens they cost, under other rules, floors, weights and numbers.

    python bench/tune_forks.py [--bfcl FOLDER] [--num N] [--only PART] [--threads N] [--json FILE]

Samples trees with the embedded model from its dialogues of split `preference`, or from BFCL's single-turn questions
(FOLDER holds question/ and possible_answer/; the first possible answer is the gold one), once for each setting: one
option changed from the defaults. Every pair has an exact answer for its chosen side; `own` is the share of pairs in
which the model wrote it. `one` counts, per 1,000 decoded tokens, the pairs whose rejected side has one error only,
`near` those in which the token with which the rejected side left the trunk has a probability of at least 0.1: the
others are errors that the model hardly makes. `log p` is the mean log-probability of that token. Field classes stand
with forks / pairs that came of them; a fork tries several tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ttpa.construct import construct_dialogues
from ttpa.data.dialogues import Dialogue
from ttpa.embedded import MODEL_DIR
from ttpa.model import load_model, load_tokenizer
from ttpa.sampling import SamplingOptions, sample_trees
from ttpa.sampling.forks import FIELD_WEIGHT, token_fields
from ttpa.sampling.rules import RULES
from ttpa.trees.record import Pair, PreferenceTree

NEAR = 0.1
CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple")
TYPES = {"dict": "object", "float": "number", "tuple": "array"}  # BFCL's names of JSON types
DEFAULTS = SamplingOptions()
FREE = replace(DEFAULTS, min_entropy=0.02, min_probability=0.005, min_ratio=0.0)


@dataclass(frozen=True)
class Setting:
    """Options under a name, and the weights of field classes."""

    name: str
    options: SamplingOptions
    weights: dict[str, float] = field(default_factory=lambda: dict(FIELD_WEIGHT))


def varied(name: str, *values: Any, of: SamplingOptions = DEFAULTS) -> list[Setting]:
    """One option with other values."""
    return [Setting(f"{name} {value}", replace(of, **{name: value})) for value in values]


SCARCE = replace(FREE, num_forks=2)  # more candidates than forks, so that the order of the candidates decides
PARTS: dict[str, list[Setting]] = {
    "defaults": [Setting("defaults", DEFAULTS)],
    "floors": [
        Setting("low floors", FREE),
        *varied("min_entropy", 0.2, 0.4),
        *varied("min_probability", 0.005, 0.05, 0.1),
        *varied("min_ratio", 0.0, 0.1, 0.2),
    ],
    "numbers": [
        *varied("alternatives", 1, 3),
        *varied("num_forks", 1, 2),
        *varied("min_distance", 4),
        *varied("max_leaves", 4),
        *varied("max_depth", 2),
    ],
    "order, with low floors and 2 forks": [
        *varied("rule", *RULES, of=SCARCE),
        *varied("fork_order", "first", of=SCARCE),
        Setting("weights even", SCARCE, dict.fromkeys(FIELD_WEIGHT, 1.0)),
        Setting("weights squared", SCARCE, {name: weight**2 for name, weight in FIELD_WEIGHT.items()}),
        Setting("weights reversed", SCARCE, dict(zip(FIELD_WEIGHT, reversed(FIELD_WEIGHT.values()), strict=True))),
    ],
    "independent samples": varied("num_samples", 5, of=replace(DEFAULTS, mode="release")),
}


def bfcl_dialogues(folder: Path, num: int) -> list[Dialogue]:
    """The first questions of each category with their first possible answers, `num` in all."""
    found = []
    for category in CATEGORIES:
        questions, answers = (
            [json.loads(line) for line in (folder / part / f"BFCL_v4_{category}.json").read_text().splitlines()]
            for part in ("question", "possible_answer")
        )
        truth = {row["id"]: row["ground_truth"] for row in answers}
        for row in questions[: num // len(CATEGORIES)]:
            calls = [
                {"type": "function", "function": {"name": name, "arguments": first_answer(arguments)}}
                for call in truth[row["id"]]
                for name, arguments in call.items()
            ]
            tools = [{"type": "function", "function": json_schema(tool)} for tool in row["function"]]
            said = {"role": "assistant", "content": "", "tool_calls": calls}
            found.append(Dialogue(row["id"], tools, [*row["question"][0], said], {"category": category}))
    return found


def first_answer(arguments: dict[str, list[Any]]) -> dict[str, Any]:
    """The first possible value of each argument; one that may be left out (a value "") is."""
    chosen = {name: values[0] for name, values in arguments.items() if "" not in values}
    return {
        name: first_answer(value)
        if isinstance(value, dict)
        else [first_answer(v) if isinstance(v, dict) else v for v in value]
        if isinstance(value, list)
        else value
        for name, value in chosen.items()
    }


def json_schema(schema: Any) -> Any:
    """BFCL's schema with the type names of JSON Schema."""
    if isinstance(schema, list):
        return [json_schema(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    converted = {key: json_schema(value) for key, value in schema.items() if (key, value) != ("type", "any")}
    if isinstance(converted.get("type"), str):
        converted["type"] = TYPES.get(converted["type"], converted["type"])
    return converted


def forked(tree: PreferenceTree, pair: Pair) -> tuple[int, float] | None:
    """Where the rejected side of a pair left the trunk, and the log-probability of the token with which it did; None
    where the trunk itself is rejected, or nothing was forked."""
    if tree.leaves[0].kind != "trunk" or pair.rejected == 0:
        return None
    trunk, ids = tree.completion_ids(0), tree.completion_ids(pair.rejected)
    logps = [logp for node in tree.path(pair.rejected) for logp in tree.nodes[node].logps or []]
    at = next(i for i, token in enumerate(ids) if i >= len(trunk) or token != trunk[i])
    return at, logps[at]


def measure(model: Any, tokenizer: Any, dialogues: list[Dialogue], setting: Setting) -> dict[str, Any]:
    """The numbers of one setting."""
    with patch.dict(FIELD_WEIGHT, setting.weights):
        trees, report = sample_trees(model, tokenizer, dialogues, options=setting.options)
        logps: list[float] = []
        by_class: Counter[str] = Counter()
        own = one = 0
        for tree in trees:
            fields = token_fields(tokenizer, tree.completion_ids(0), tree.tools)
            for pair in tree.pairs:
                own += tree.leaves[pair.chosen].kind != "gold"
                one += len(tree.leaves[pair.rejected].errors) == 1
                left = forked(tree, pair)
                if left is not None:
                    by_class[fields[left[0]] or "outside"] += 1
                    logps.append(left[1])
    near = sum(logp >= math.log(NEAR) for logp in logps)
    return {
        "setting": setting.name,
        "options": asdict(setting.options),
        "weights": setting.weights,
        "decisions": report.decisions - len(report.dropped),
        "exact_trunks": report.exact_trunks,
        "decoded_tokens": report.decoded_tokens,
        "pairs": report.pairs,
        "trees": report.trees,
        "pairs_per_1000_tokens": report.pairs_per_1000_tokens,
        "pairs_per_tree": report.pairs / report.trees if report.trees else 0.0,
        "one_error_per_1000_tokens": 1000 * one / report.decoded_tokens,
        "chosen_own": own / report.pairs if report.pairs else 0.0,
        "mean_logp": sum(logps) / len(logps) if logps else None,
        "near_per_1000_tokens": 1000 * near / report.decoded_tokens if logps else None,
        "duplicates": report.duplicates,
        "forks": dict(report.forks),
        "pairs_by_class": dict(by_class),
        "dropped_forks": dict(report.dropped_forks),
        "seconds": report.seconds,
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    classes = "  ".join(f"{n} {row['forks'].get(n, 0)}/{row['pairs_by_class'].get(n, 0)}" for n in FIELD_WEIGHT)
    logp, near = ("-" if row[n] is None else f"{row[n]:.1f}" for n in ("mean_logp", "near_per_1000_tokens"))
    return (
        f"{row['setting']:<22} {row['pairs']:>6} {row['trees']:>6} {row['decoded_tokens']:>7} "
        f"{row['pairs_per_1000_tokens']:>8.1f} {row['one_error_per_1000_tokens']:>5.1f} {row['pairs_per_tree']:>6.2f} "
        f"{row['chosen_own']:>5.0%} {logp:>6} {near:>6}  {classes}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bfcl", type=Path, help="folder of BFCL v4; none takes dialogues of the embedded world")
    parser.add_argument("--num", type=int, default=200, help="dialogues")
    parser.add_argument("--only", choices=list(PARTS), action="append", help="parts of the table; may be repeated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(MODEL_DIR, dtype=torch.float32), load_tokenizer(MODEL_DIR)
    if arguments.bfcl is None:
        dialogues = construct_dialogues(arguments.num, split="preference")
    else:
        dialogues = bfcl_dialogues(arguments.bfcl, arguments.num)
    rows = []
    for part in arguments.only or PARTS:
        print(
            f"\n{part}\n{'':<22}  pairs  trees  tokens  /1,000   one  /tree   own  log p   near  forks/pairs by class"
        )
        for setting in PARTS[part]:
            rows.append({"part": part, **measure(model, tokenizer, dialogues, setting)})
            print(line(rows[-1]))
            sys.stdout.flush()
    print(f"\n{rows[0]['decisions']} decisions of {len(dialogues)} dialogues")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
