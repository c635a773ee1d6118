"""Random mutations of BFCL's gold calls under the preset `bfcl` and under the original checker.

    pip install --no-deps bfcl-eval==2026.3.23
    PYTHONPATH=.:kernels python tests/compare_bfcl.py --outputs 20000

The questions are those of the package: single turn, Python, live ones too. Both must agree on what is valid and, but
for the parallel categories, on the type of the first error. Where the original crashes nothing is compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

from ttpa.esm.score import score_call

# The table of models that the checker imports needs the package of every vendor; it reads one flag of it.
models = ModuleType("bfcl_eval.constants.model_config")
models.MODEL_CONFIG_MAPPING = {"any": SimpleNamespace(underscore_to_dot=False)}
sys.modules["bfcl_eval.constants.model_config"] = models

import bfcl_eval  # noqa: E402  # reads the table that stands above
from bfcl_eval.constants.enums import Language  # noqa: E402
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker  # noqa: E402

CATEGORIES = ["simple_python", "multiple", "parallel", "parallel_multiple"]
CATEGORIES += ["live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"]
VALUES = [0, 1, 3, -2.5, 5.0, True, False, None, "", " ", "x", "New York, NY", "10:00", [], [1], [1.0, 2.0], ["a", "b"]]
VALUES += [{}, {"a": 1}, {"a": [1]}, [{"a": 1}], [[1]], "1", "[]"]


def questions(folder):
    """Category, functions and gold calls of every question."""
    for category in CATEGORIES:
        name = f"BFCL_v4_{category}.json"
        gold = {row["id"]: row["ground_truth"] for row in _rows(folder / "possible_answer" / name)}
        for row in _rows(folder / name):
            yield category, row["function"], gold[row["id"]]


def _rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def some_call(gold, rng):
    """A call that takes one alternative of each parameter, and leaves out some that may be left out."""
    ((name, parameters),) = gold.items()
    arguments = {}
    for key, alternatives in parameters.items():
        if alternatives and not ("" in alternatives and rng.random() < 0.5):
            arguments[key] = _plain(rng.choice(alternatives), rng)
    return {"name": name, "arguments": arguments}


def _plain(value, rng):
    """A value as a model writes it: the parts of a dict have lists of alternatives."""
    if isinstance(value, dict):
        return {
            key: _plain(rng.choice(part), rng) if isinstance(part, list) and part else part
            for key, part in value.items()
        }
    return [_plain(part, rng) for part in value] if isinstance(value, list) else value


def changed(value, rng):
    """A value like the given one, or another."""
    kind = rng.randrange(6)
    if isinstance(value, str) and kind < 4:
        return [value.upper(), value.replace(" ", ""), f"{value}.", value.replace(",", "-")][kind]
    if isinstance(value, bool | int | float) and kind < 3:
        return [str(value), float(value), int(value)][kind]
    if isinstance(value, list) and value and kind < 4:
        return [value[::-1], value[1:], [*value, value[0]], [changed(value[0], rng), *value[1:]]][kind]
    if isinstance(value, dict) and value and kind < 4:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        return [rest, {**value, "more": 1}, {**value, key: changed(value[key], rng)}, list(value)][kind]
    return rng.choice(VALUES)


def mutate(calls, functions, rng):
    """Change some calls in place."""
    kind = rng.randrange(10)
    if kind == 0:
        rng.shuffle(calls)
    if not calls:
        return
    if kind == 1:
        calls.append(copy.deepcopy(rng.choice(calls)))
    if kind == 2:
        calls.pop()
    if kind < 3:
        return
    call = rng.choice(calls)
    arguments = call["arguments"]
    key = rng.choice([*arguments, "unknown"])
    if kind == 3:
        call["name"] = rng.choice([*(function["name"] for function in functions), call["name"].replace(".", "_"), "no"])
    elif kind == 4:
        arguments.pop(key, None)
    elif kind == 5:
        schema = next((f for f in functions if f["name"] == call["name"]), functions[0])
        arguments[rng.choice([*schema["parameters"]["properties"], "unknown"])] = rng.choice(VALUES)
    elif kind == 6 and key in arguments:
        arguments[f"{key}s"] = arguments.pop(key)
    elif key in arguments:
        arguments[key] = changed(arguments[key], rng)


def compare(outputs, *, seed=0):
    """How many outputs the original found valid, wrong, or crashed on, and a line for each that we judge otherwise."""
    every = list(questions(Path(bfcl_eval.__file__).parent / "data"))
    counts, differences = Counter(), []
    for number in range(outputs):
        rng = random.Random(f"{seed}/{number}")
        category, functions, gold = rng.choice(every)
        calls = [some_call(one, rng) for one in gold]
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            mutate(calls, functions, rng)
        ours = score_call(calls, gold, functions, preset="bfcl")
        records = [{call["name"]: call["arguments"]} for call in calls]
        try:
            theirs = ast_checker(functions, records, gold, Language.PYTHON, category, "any")
        except Exception as error:
            counts[f"crashed: {type(error).__name__}"] += 1
            continue
        counts["valid" if theirs["valid"] else "wrong"] += 1
        found = (ours.valid, ours.errors[0].error_type if ours.errors else None)
        expected = (theirs["valid"], theirs.get("error_type") if not theirs["valid"] else None)
        if "parallel" in category:
            found, expected = found[:1], expected[:1]
        if found != expected:
            differences.append(f"output {number} ({category}): {found} and not {expected}: {calls} for {gold}")
    return counts, differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--outputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    counts, differences = compare(**vars(parser.parse_args()))
    print(f"the original: {dict(counts)}; {len(differences)} judged otherwise")
    for line in differences[:20]:
        print(line)
    sys.exit(bool(differences))
