"""Scores random and mutated outputs of a model, in every dialect and under every preset.

    PYTHONPATH=.:kernels python tests/fuzz_score.py --outputs 1000000

checks that no output makes the scorer raise, that none takes longer than a limit (SIGALRM breaks off a call that
hangs), that every score lies in its range and every error in the text, and prints the median time of ordinary calls.
Output n of a seed is always the same one: `--first n --outputs 1` scores it alone.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field

from dialect_writers import NOISE, WRITERS
from tqdm import tqdm

from ttpa.esm.presets import NAMES
from ttpa.esm.score import score_call

POINT = {"type": "object", "properties": {"x": {"type": "number"}, "next": {"$ref": "#/$defs/point"}}}
PROPERTIES = {
    "city": {"type": "string", "pattern": "^[A-Z]"},
    "days": {"type": "integer", "minimum": 1, "default": 3},
    "unit": {"enum": ["C", "F"]},
    "day": {"type": "string", "format": "date"},
    "tags": {"type": "array", "items": {"type": ["string", "null"]}, "uniqueItems": True},
    "at": {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]},
}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["city"], "$defs": {"point": POINT}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}, {"name": "wind"}]
VALUES = ["Oslo", "oslo", "", "Köln ✈️", "a \"b\" 'c'\\", 3, 3.0, -1e308, True, None, "C", "2026-01-31", [], ["a", None]]
VALUES += [{"x": 1.5}, {"next": {"next": {"x": "1"}}}, [[{}], {"a/b~": [0]}], "</tool_call>\n", "x" * 300, 10**30]
RANGE = {"toolrl": (-3.0, 3.0), "tl_training": (-2.0, 1.0)}
GOLD = [{"name": "weather", "arguments": {"city": "Oslo", "days": 3, "unit": "C"}}]
ORDINARY = [
    GOLD,
    [{"name": "weather", "arguments": {"city": "Rome", "days": "3", "unit": "C"}}],
    [{"name": "wind", "arguments": {"city": "Oslo"}}],
]


@dataclass
class Outcome:
    """How many outputs were scored, without any error and with some, and the seconds and the name of the slowest."""

    valid: int = 0
    wrong: int = 0
    slowest: tuple[float, str] = (0.0, "")
    codes: set[str] = field(default_factory=set)


def some_calls(rng):
    return [
        {
            "name": rng.choice(("weather", "weather", "wind", "w")),
            "arguments": {key: rng.choice(VALUES) for key in rng.sample([*PROPERTIES, "wind"], rng.randrange(5))},
        }
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3)))
    ]


def mutated(text, rng):
    """The text with some pieces cut out, doubled or replaced by noise."""
    for _ in range(rng.choice((0, 1, 1, 2, 3, 5))):
        start = rng.randint(0, len(text))
        end = min(len(text), start + rng.choice((0, 0, 1, 1, 4, 20)))
        piece = rng.choice(
            ("", rng.choice(NOISE), rng.choice(NOISE) * 30, text[start:end] * 2, chr(rng.randrange(1, 0xD800)))
        )
        text = text[:start] + piece + text[end:]
    return text[: rng.randint(0, len(text))] if rng.random() < 0.2 else text


def some_output(dialect, gold, rng):
    """The gold calls, others, or nothing but noise, as text that is mutated or not; sometimes as records."""
    kind = rng.random()
    if kind < 0.05:
        return some_calls(rng)
    if kind < 0.15:
        return "".join(rng.choices(NOISE, k=rng.randrange(60)))
    return mutated(WRITERS[dialect](gold if kind < 0.5 else some_calls(rng)), rng)


def fuzz(outputs, *, seed=0, first=0, limit=1.0, progress=False):
    """Score outputs first, first + 1, ... of the seed; an AssertionError names the first that is not scored as it
    must be, and what it was."""
    outcome = Outcome()
    previous = signal.signal(signal.SIGALRM, _out_of_time)
    try:
        for number in tqdm(range(first, first + outputs), disable=not progress):
            rng = random.Random(f"{seed}/{number}")
            dialect, preset = rng.choice(list(WRITERS)), rng.choice(NAMES)
            gold = [call for call in some_calls(rng) if call["name"] != "w"]
            output = some_output(dialect, gold, rng)
            signal.setitimer(signal.ITIMER_REAL, limit)
            start = time.perf_counter()
            try:
                score = score_call(output, _answers(gold, preset), TOOLS, preset=preset, dialect=dialect)
                _check(score, output, preset)
            except Exception as error:
                signal.setitimer(signal.ITIMER_REAL, 0)
                case = f"output {number} of seed {seed} ({dialect}, {preset}): {output!r} for {gold!r}"
                raise AssertionError(f"{type(error).__name__}: {error}\n{case}") from error
            seconds = time.perf_counter() - start
            signal.setitimer(signal.ITIMER_REAL, 0)
            outcome.valid += score.valid
            outcome.wrong += not score.valid
            outcome.codes.update(error.code for error in score.errors)
            outcome.slowest = max(outcome.slowest, (seconds, f"output {number} ({dialect}, {preset})"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return outcome


def ordinary_milliseconds(dialect, preset, *, repeats=300):
    """The median time to score an ordinary call of three parameters: right, with wrong values, and of another tool."""
    outputs, gold = [WRITERS[dialect](calls) for calls in ORDINARY], _answers(GOLD, preset)
    seconds = []
    for _ in range(repeats):
        for output in outputs:
            start = time.perf_counter()
            score_call(output, gold, TOOLS, preset=preset, dialect=dialect)
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def _out_of_time(signal_number, frame):
    raise TimeoutError("the scorer hangs")


def _answers(gold, preset):
    """The gold calls; for bfcl as lists of alternatives, each value the only one."""
    if preset != "bfcl":
        return gold
    return [{call["name"]: {key: [value] for key, value in call["arguments"].items()}} for call in gold]


def _check(score, output, preset):
    low, high = RANGE.get(preset, (0.0, 1.0))
    assert low <= score.score <= high and score.valid == (not score.errors), score
    for error in score.errors:
        if isinstance(output, str):
            assert error.span is not None and 0 <= error.span[0] <= error.span[1] <= len(output), error
        else:
            assert error.span is None, error
    json.dumps([error.to_leaf() for error in score.errors])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--outputs", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1.0, help="seconds that one output may take")
    arguments = parser.parse_args()
    start = time.perf_counter()
    outcome = fuzz(**vars(arguments), progress=sys.stderr.isatty())
    print(
        f"{outcome.valid + outcome.wrong} outputs scored in {time.perf_counter() - start:.0f} s, {outcome.valid} right"
    )
    print(f"slowest: {1000 * outcome.slowest[0]:.1f} ms, {outcome.slowest[1]}")
    print(f"error codes seen: {', '.join(sorted(outcome.codes))}")
    print("median milliseconds of an ordinary call:")
    print(f"{'':>14}" + "".join(f"{preset:>13}" for preset in NAMES))
    for dialect in WRITERS:
        print(f"{dialect:>14}" + "".join(f"{ordinary_milliseconds(dialect, preset):>13.3f}" for preset in NAMES))
