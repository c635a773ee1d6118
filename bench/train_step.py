"""One training step of TRL's DPOTrainer and one of ttpa, side by side on the same pairs and the same model.

    python bench/train_step.py [--case NAME] [--rounds N] [--threads N] [--json FILE]
    python bench/train_step.py --device cuda

A step is: forward of the policy, loss, backward, clipping, AdamW, metrics. TRL's is measured with its reference model
beside the policy, with `precompute_ref_log_probs`, and with that and gradient accumulation over fewer pairs at a time;
the last line is the ratio to the fastest of these, whichever it is. Its batches are collated beforehand. That of ttpa
is the one of `ttpa.training.loop`, packing included, with cached log-probabilities; on a CPU a pack is a tree.
`reference` is the time in which the log-probabilities of one step's pairs are made, and the last ratio counts it in, as
a run of a single epoch does. Completions of one prompt differ from their first token on: only the prompt is shared. The
losses of the first two steps have to agree.

On a CPU all sides run in one process and take turns; times are medians. Peak memory is that of a fresh process for each
side: the highest resident set over three steps minus the resident set after the imports. On a GPU one side runs after
the other, memory is what torch allocated at most, and a side without room is reported as such; TRL then tries again
with gradient checkpointing. MFU is that of ttpa on the tokens that it computes.

Beside other work use `--threads 1`: two threads that wait for each other and for a third party measure the third party.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose files have everyday names

import torch
import transformers
import trl
from datasets import disable_progress_bars
from transformers import Qwen2Config, Qwen3Config

from bench import ROOT, environment
from bench.memory import FORGET, _resident
from bench.step_sides import Case, Side, sides_of, synchronized
from ttpa.files import atomic_write
from ttpa.training.hardware import device_flops

SMALL = Qwen3Config(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=False,
)
QWEN_15B = Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
QWEN_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)


def large(config: Qwen2Config, *, trees: int, micro: int, pack_tokens: int, lora: bool) -> Case:
    return Case(config, trees, 2048, 96, 4, 8.0, 0.4, micro=micro, pack_tokens=pack_tokens, lora=lora, bf16=True)


CASES = {
    "cpu": {
        "512-48-1:4": Case(SMALL, 2, 512, 48, 4, faster=9.0, memory=0.35, micro=8, parts=2, pack_tokens=800),
        "2048-48-1:4": Case(SMALL, 1, 2048, 48, 4, faster=9.0, memory=0.35, micro=4, parts=1),
        "1024-64-1:1": Case(SMALL, 4, 1024, 64, 1, faster=2.6, memory=0.35, micro=4, parts=1, pack_tokens=1200),
    },
    "cuda": {
        "1.5B-full": large(QWEN_15B, trees=4, micro=2, pack_tokens=8192, lora=False),
        "7B-lora": large(QWEN_7B, trees=2, micro=1, pack_tokens=4096, lora=True),
        "1.5B-lora": large(QWEN_15B, trees=4, micro=2, pack_tokens=8192, lora=True),
        "7B-full": large(QWEN_7B, trees=2, micro=1, pack_tokens=4096, lora=False),
    },
}
TOY = Qwen2Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def toy(case: Case) -> Case:
    """The same in a size for tests."""
    return replace(case, config=TOY, prompt=24, completion=4)


def seconds_in_turns(
    runs: dict[str, Callable[[], Any]], *, warm_ups: int, rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """Seconds of each round of each, one after the other in every round, and what the warm-ups returned."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    returned: dict[str, list[Any]] = {name: [] for name in runs}
    for turn in range(-warm_ups, rounds):
        for name, run in runs.items():
            start = synchronized(device)
            result = run()
            if turn < 0:
                returned[name].append(result)
            else:
                seconds[name].append(synchronized(device) - start)
    return seconds, returned


def measure(sides: dict[str, Side], case: Case, *, rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Of each side the pairs per second, the seconds of a reference pass, and the losses of the first two steps."""
    passes = {name: side.reference for name, side in sides.items() if side.reference is not None}
    reference, _ = seconds_in_turns(passes, warm_ups=1, rounds=min(rounds, 3), device=device)
    steps = {name: side.step for name, side in sides.items()}
    seconds, losses = seconds_in_turns(steps, warm_ups=2, rounds=rounds, device=device)
    logs = {name: side.logged for name, side in sides.items() if side.logged is not None}
    logged, _ = seconds_in_turns(logs, warm_ups=1, rounds=min(rounds, 3), device=device)
    found: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        step = statistics.median(seconds[name])
        if name in logged:
            step = 0.9 * step + 0.1 * statistics.median(logged[name])
        once = statistics.median(reference[name]) if name in reference else 0.0
        found[name] = {
            "pairs_per_second": case.pairs / step,
            "pairs_per_second_one_epoch": case.pairs / (step + once),
            "reference_seconds": once,
            "step_seconds": step,
            "seconds": seconds[name],
            "losses": losses[name],
        }
        rate = device_flops(device)
        if side.flops is not None and rate is not None:
            found[name]["mfu"] = side.flops / step / rate
    return found


def on_cpu(name: str, case: Case, *, rounds: int, arguments: list[str]) -> dict[str, dict[str, Any]]:
    """All sides in turns, then their memory, each in a fresh process."""
    device = torch.device("cpu")
    sides = {side: make(device) for side, make in sides_of(case).items()}
    found = measure(sides, case, rounds=rounds, device=device)
    for side, numbers in found.items():
        command = [sys.executable, __file__, *arguments, "--case", name, "--peak", side]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment())
        numbers["peak_bytes"] = int(done.stdout.split()[-1])
    return found


def on_gpu(case: Case, *, rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """One side after the other; `out_of_memory` where one has no room."""
    found: dict[str, dict[str, Any]] = {}
    for side, make in sides_of(case).items():
        tries = {side: make}
        if side != "ttpa":
            tries[f"{side} checkpointing"] = partial(make, checkpointing=True)
        for name, make_again in tries.items():
            torch.cuda.reset_peak_memory_stats()
            try:
                found[name] = measure({name: make_again(device)}, case, rounds=rounds, device=device)[name]
                found[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
            except torch.cuda.OutOfMemoryError:
                found[name] = {"out_of_memory": True}
            gc.collect()  # models lie in circles of references
            torch.cuda.empty_cache()
            if "out_of_memory" not in found[name]:
                break
    return found


def peak_bytes(side: str, case: Case) -> int:
    """Highest resident set of a side's first steps above the one after the imports; to be called in a fresh process."""
    before = _resident("VmRSS")
    FORGET.write_text("5")  # the peak of the imports
    made = sides_of(case)[side](torch.device("cpu"))
    if made.reference is not None:
        made.reference()
    for _ in range(3):
        made.step()
    return _resident("VmHWM") - before


def summary(case: Case, sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ours over the faster setting of TRL; raises RuntimeError where sides disagree about the loss of a first step."""
    run = {name: side for name, side in sides.items() if "out_of_memory" not in side}
    tolerance = 2e-2 if case.bf16 else 1e-5
    for name, side in run.items():
        for ours, theirs in zip(run.get("ttpa", side)["losses"], side["losses"], strict=True):
            if abs(ours - theirs) > tolerance * abs(theirs):
                raise RuntimeError(f"ttpa and {name} disagree about the loss of a step: {ours} and {theirs}")
    peers = {name: side for name, side in run.items() if name != "ttpa"}
    if "ttpa" not in run or not peers:
        return {}
    fastest = max(peers, key=lambda name: peers[name]["pairs_per_second"])
    one_epoch = max(side["pairs_per_second_one_epoch"] for side in peers.values())
    return {
        "peer": fastest,
        "faster": run["ttpa"]["pairs_per_second"] / peers[fastest]["pairs_per_second"],
        "memory": run["ttpa"]["peak_bytes"] / peers[fastest]["peak_bytes"],
        "faster_one_epoch": run["ttpa"]["pairs_per_second_one_epoch"] / one_epoch,
    }


def lines(name: str, case: Case, sides: dict[str, dict[str, Any]], ratios: dict[str, Any]) -> list[str]:
    """The result of a case for a reader."""
    shown = [
        f"{name}: {case.pairs} pairs a step",
        f"  {'':24}{'pairs/s':>9}{'ttpa is':>9}{'reference s':>13}{'GB':>8}{'ttpa has':>10}{'MFU':>8}",
    ]
    for side, numbers in sides.items():
        if "out_of_memory" in numbers:
            shown.append(f"  {side:24}out of memory")
            continue
        ours, faster, less = sides.get("ttpa", {}), "", ""
        if side != "ttpa" and "peak_bytes" in ours:
            faster = f"{ours['pairs_per_second'] / numbers['pairs_per_second']:.2f}x"
            less = f"{ours['peak_bytes'] / numbers['peak_bytes']:.2f}x"
        mfu = f"{100 * numbers['mfu']:7.1f}%" if "mfu" in numbers else ""
        shown.append(
            f"  {side:24}{numbers['pairs_per_second']:9.2f}{faster:>9}{numbers['reference_seconds']:13.2f}"
            f"{numbers['peak_bytes'] / 1e9:8.2f}{less:>10}{mfu}"
        )
    if ratios:
        shown.append(
            f"  ttpa over {ratios['peer']}: {ratios['faster']:.2f}x the pairs/s (>= {case.faster:g}), "
            f"{ratios['memory']:.2f}x the memory (<= {case.memory:g}); "
            f"{ratios['faster_one_epoch']:.2f}x with the reference pass of one epoch"
        )
    return shown


def main() -> None:
    """Measure the chosen cases and print them; numbers are written after each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=CASES, default="cpu")
    parser.add_argument("--case", choices=[*CASES["cpu"], *CASES["cuda"]], help="one case instead of all")
    parser.add_argument("--rounds", type=int, help="timed steps of each side; 5, on a GPU 3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--toy", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bars()
    cases = {name: case for name, case in CASES[options.device].items() if options.case in (None, name)}
    if options.toy:
        cases = {name: toy(case) for name, case in cases.items()}
    if options.peak:
        print(peak_bytes(options.peak, cases[options.case]))
        return
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    record: dict[str, Any] = {"versions": versions, "threads": options.threads, "cases": {}}
    for name, case in cases.items():
        if options.device == "cpu":
            arguments = ["--threads", str(options.threads), *(["--toy"] if options.toy else [])]
            sides = on_cpu(name, case, rounds=options.rounds or 5, arguments=arguments)
        else:
            sides = on_gpu(case, rounds=options.rounds or 3, device=torch.device("cuda"))
        ratios = summary(case, sides)
        print(*lines(name, case, sides, ratios), sep="\n", flush=True)
        record["cases"][name] = {"pairs_per_step": case.pairs, "sides": sides, **ratios}
        if options.json:
            with atomic_write(options.json) as file:
                file.write(json.dumps(record))


if __name__ == "__main__":
    main()
