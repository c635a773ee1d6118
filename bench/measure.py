"""One comparison: the sides of a case in turns, with their memory, their errors, and the rate of plain products."""

from __future__ import annotations

import faulthandler
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Results = dict[str, torch.Tensor]
Run = Callable[[], Results]
FLUSH_BYTES = 256 << 20  # larger than the L2 cache of any GPU
STDERR = sys.__stderr__ or 2  # also where sys.stderr is not a file
WARM_UP_SECONDS = 90  # compiling and autotuning included; a side that takes longer is stopped with its process
PRODUCT = "product "  # before the names of plain products, beside those of sides
VALUES = (
    "logp",
    "loss",
    "margins",
    "kl",
    "lse",
    "entropy",
    "varentropy",
    "top_logit",
)  # absolute errors; the others are relative


class Absent(Exception):
    """A side that cannot run here; the message says why."""


class DeviceLost(Exception):
    """The GPU refuses further work after an error of `side`: only a new process can go on."""

    def __init__(self, side: str, reason: str) -> None:
        super().__init__(f"the device no longer answers after {side}: {reason}")
        self.side, self.reason = side, reason


@dataclass(frozen=True)
class Side:
    """One competitor: `build` takes the inputs of the case and returns what is timed, or raises Absent.

    `units` counts its products of all rows (`2 R V H` operations) where the case has such products; `plan` returns
    what is known beforehand from the inputs, `units` or `planned_bytes`.
    """

    build: Callable[[Any], Run]
    units: float | None = None
    plan: Callable[[Any], dict[str, float]] | None = None
    note: str = ""


@dataclass(frozen=True)
class Case:
    """Inputs and the sides that compute the same from them.

    `reference` computes it in fp64. `products` returns the plain matrix products of the same shapes by name (forward,
    dhidden, dweight), `minimum` names those that nobody can do without, for the `share` of the rows that count.
    `operations` counts the floating-point operations of those, or of whatever else the result needs at least.
    """

    op: str
    name: str
    inputs: Callable[[torch.device], Any]
    sides: Mapping[str, Side]
    reference: Callable[[Any], Results] | None = None
    products: Callable[[Any], dict[str, Callable[[], object]]] | None = None
    minimum: Sequence[str] = ()
    share: float = 1.0
    operations: float | None = None
    shape: dict[str, Any] = field(default_factory=dict)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def answers(device: torch.device) -> bool:
    """Whether the device still works: some errors of a kernel are final for the process."""
    try:
        synchronize(device)
    except Exception:
        return False
    return True


def interleave(
    runs: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each call: the calls take turns, and another one begins each round.

    Everything has been called before. At least three rounds, at most `rounds`, as many as fit in `seconds`. A GPU is
    timed by its own events, behind writes of FLUSH_BYTES that empty the cache and let the host run ahead, so that
    short kernels are not timed by their launches.
    """
    names = list(runs)
    taken: dict[str, list[float]] = {name: [] for name in names}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    began = time.perf_counter()
    for r in range(rounds):
        if r >= 3 and (time.perf_counter() - began) * (r + 1) / r > seconds:
            break
        for name in names[r % len(names) :] + names[: r % len(names)]:
            if flush is None:
                start = time.perf_counter()
                runs[name]()
                taken[name].append(time.perf_counter() - start)
            else:
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                for _ in range(4):
                    flush.zero_()
                before.record()
                runs[name]()
                after.record()
                after.synchronize()
                taken[name].append(before.elapsed_time(after) / 1e3)
    return taken


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and extremes, with all values."""
    ordered = sorted(seconds)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        "median": statistics.median(ordered),
        "quartiles": [quartiles[0], quartiles[2]],
        "extremes": [ordered[0], ordered[-1]],
        "seconds": list(seconds),
    }


def gpu_memory(run: Run, device: torch.device) -> dict[str, int]:
    """Bytes that `run` holds at its peak above what is there before, and how many of them are its results."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = run()
    torch.cuda.synchronize(device)
    return {"peak_bytes": torch.cuda.max_memory_allocated(device) - before, "result_bytes": result_bytes(results)}


def result_bytes(results: Results) -> int:
    return sum(value.numel() * value.element_size() for value in results.values())


def errors(results: Results, reference: Results) -> dict[str, dict[str, float]]:
    """Distance from fp64: root mean square and largest for values in nats, relative norm for all others."""
    table = {}
    for name in results.keys() & reference.keys():
        truth = reference[name]
        distance = results[name].double().reshape(truth.shape) - truth
        if name in VALUES:
            table[name] = {"rms": float(distance.square().mean().sqrt()), "max": float(distance.abs().max())}
        else:
            norm = torch.linalg.vector_norm
            table[name] = {"relative": float(norm(distance) / norm(truth))}
    return dict(sorted(table.items()))


def explain(error: BaseException) -> str:
    """The last frames and the message of an error."""
    lines = "".join(traceback.format_exception(error)).strip().splitlines()
    return "\n".join(lines[-12:])


def measure(
    case: Case,
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    skip: Mapping[str, str] | None = None,
    starting: Callable[[str], None] = lambda side: None,
) -> dict[str, Any]:
    """Run a case: errors and memory from single calls, then times in turns (none with `rounds=0`).

    A side that fails or is absent is listed with the reason, and so is one named in `skip`. `starting` is told the
    name of each side before its first call. Raises DeviceLost where a failure leaves the GPU unusable.
    """
    skip = skip or {}
    if device.type == "cuda":
        torch.compiler.reset()  # what other cases compiled counts against a limit
    inputs = case.inputs(device)
    record: dict[str, Any] = {"op": case.op, "case": case.name, "shape": case.shape, "sides": {}, "absent": {}}
    record["failed"] = {name: reason for name, reason in skip.items() if name in case.sides}
    runs: dict[str, Callable[[], object]] = {}
    for name, product in (case.products(inputs) if case.products and rounds else {}).items():
        product()
        runs[PRODUCT + name] = product
    reference = case.reference(inputs) if case.reference else None
    for name, side in case.sides.items():
        if name in skip:
            continue
        starting(name)
        faulthandler.dump_traceback_later(WARM_UP_SECONDS, exit=True, file=STDERR)
        try:
            runs[name], record["sides"][name] = _warm_up(side, inputs, reference, device)
        except Absent as absent:
            record["absent"][name] = str(absent)
        except Exception as error:
            record["failed"][name] = explain(error)
            if not answers(device):
                raise DeviceLost(name, record["failed"][name]) from None
        finally:
            faulthandler.cancel_dump_traceback_later()
        _release(device)
    if rounds:
        taken = interleave(runs, device, rounds=rounds, seconds=seconds)
        for name, entry in record["sides"].items():
            entry |= spread(taken.pop(name))
        _add_rates(case, record, {name.removeprefix(PRODUCT): spread(values) for name, values in taken.items()})
    runs.clear()
    del inputs, reference
    _release(device)
    return record


def _warm_up(side: Side, inputs: Any, reference: Results | None, device: torch.device) -> tuple[Run, dict[str, Any]]:
    """Everything about a side but its times."""
    run = side.build(inputs)
    results = run()
    synchronize(device)
    entry: dict[str, Any] = {"note": side.note} if side.note else {}
    if reference is not None:
        entry["errors"] = errors(results, reference)
    if device.type == "cuda":
        del results
        entry |= gpu_memory(run, device)
    if side.units is not None:
        entry["units"] = side.units
    if side.plan is not None:
        entry |= side.plan(inputs)
    return run, entry


def _add_rates(case: Case, record: dict[str, Any], products: dict[str, dict[str, Any]]) -> None:
    """Operations per second, and each time beside that of the plain products: of its own units, and of the fewest."""
    if case.operations is not None:
        for entry in record["sides"].values():
            entry["tflops"] = case.operations / entry["median"] / 1e12
    if not products:
        return
    record["products"] = products
    medians = {name: value["median"] for name, value in products.items()}
    mean = statistics.mean(medians[name] for name in case.minimum)
    if case.operations is not None:
        record["products_tflops"] = case.operations / (mean * len(case.minimum) * case.share) / 1e12
    for entry in record["sides"].values():
        entry["of_minimum"] = entry["median"] / (mean * len(case.minimum) * case.share)
        if "units" in entry:
            entry["of_units"] = entry["median"] / (mean * entry["units"])


def _release(device: torch.device) -> None:
    """Give the memory of what is gone back to the GPU, so that no side pays for the one before."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
