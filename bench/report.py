"""Records of measurements as JSON and as Markdown, written anew after each of them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench import ROOT

PACKAGES = ("torch", "triton", "transformers", "numpy", "pytest", "pytest-benchmark", "trl", "liger-kernel")
PEERS = ("liger-cute-kernels", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl")


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers belong to: device, driver, versions, date, commit."""
    versions: dict[str, str | None] = {}
    for name in (*PACKAGES, *PEERS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": device_name(device),
        "driver": driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()})"


def slug(name: str) -> str:
    """A folder name for a device."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None


def commit() -> str | None:
    """The commit of the checkout, with `+` where it was changed; None outside of one."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader, or a kill, never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: Path, record: Any) -> None:
    write(path, json.dumps(finite(record), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """NaN and infinities as text: JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def heading(record: dict[str, Any]) -> str:
    """The machine as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    lines = [
        f"- Device: {record['device']}" + (f", driver {record['driver']}" if record["driver"] else ""),
        f"- Python {record['python']}, {versions}" + (f", CUDA {record['cuda']}" if record["cuda"] else ""),
        f"- {record['date']}, commit {record['commit']}, {record['threads']} threads",
    ]
    return "\n".join(lines)


def table(case: dict[str, Any]) -> str:
    """One case as Markdown: what was measured, then who was absent or failed."""
    sides = case["sides"]
    lines = [f"### {case['op']}: {case['case']}", ""]
    if "products" in case:
        rates = ", ".join(f"{name} {_ms(value['median'])} ms" for name, value in case["products"].items())
        rate = case.get("products_tflops")
        lines += [f"Plain products in turns with the sides: {rates}" + (f" ({rate:.3g} TFLOP/s)" if rate else ""), ""]
    columns = [column for column in COLUMNS if any(column.has(entry) for entry in sides.values())]
    if columns:
        lines.append("| side | " + " | ".join(column.title for column in columns) + " |")
        lines.append("|---|" + "---:|" * len(columns))
        for name, entry in sides.items():
            lines.append(
                f"| {name} | " + " | ".join(column.show(entry, sides.get("ttpa")) for column in columns) + " |"
            )
        lines.append("")
    notes = {name: entry["note"] for name, entry in sides.items() if entry.get("note")}
    lines += [f"- {name}: {note}" for name, note in notes.items()]
    lines += [f"- {name}: absent: {reason}" for name, reason in case["absent"].items()]
    lines += [f"- {name}: FAILED: {_last_line(reason)}" for name, reason in case["failed"].items()]
    return "\n".join(lines).rstrip() + "\n"


class _Column:
    """A column of the table: its title, the key that an entry must have, and how it is shown beside ours."""

    def __init__(self, title: str, key: str, show: Any) -> None:
        self.title, self.key, self._show = title, key, show

    def has(self, entry: dict[str, Any]) -> bool:
        return self.key in entry

    def show(self, entry: dict[str, Any], ours: dict[str, Any] | None) -> str:
        return self._show(entry, ours) if self.has(entry) else ""


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def _beside(entry: dict[str, Any], ours: dict[str, Any] | None) -> str:
    return f"{entry['median'] / ours['median']:.2f}" if ours and "median" in ours else ""


def _errors(entry: dict[str, Any], ours: dict[str, Any] | None) -> str:
    parts = []
    for name, error in entry["errors"].items():
        first = float(error["rms"] if "rms" in error else error["relative"])
        most = float(error.get("max", first))
        parts.append(f"{name} {first:.1e}" + (f" (max {most:.1e})" if most != first else ""))
    return ", ".join(parts)


COLUMNS = (
    _Column("median ms", "median", lambda entry, ours: _ms(entry["median"])),
    _Column("quartiles ms", "quartiles", lambda entry, ours: " to ".join(_ms(x) for x in entry["quartiles"])),
    _Column("times ours", "median", _beside),
    _Column("units", "units", lambda entry, ours: f"{entry['units']:.3g}"),
    _Column("times its units", "of_units", lambda entry, ours: f"{entry['of_units']:.2f}"),
    _Column("times fewest units", "of_minimum", lambda entry, ours: f"{entry['of_minimum']:.2f}"),
    _Column("TFLOP/s", "tflops", lambda entry, ours: f"{entry['tflops']:.3g}"),
    _Column("peak MB", "peak_bytes", lambda entry, ours: f"{entry['peak_bytes'] / 1e6:.1f}"),
    _Column("planned MB", "planned_bytes", lambda entry, ours: f"{entry['planned_bytes'] / 1e6:.1f}"),
    _Column("results MB", "result_bytes", lambda entry, ours: f"{entry['result_bytes'] / 1e6:.1f}"),
    _Column("errors against fp64", "errors", _errors),
)
LEGEND = """\
Times are medians of calls in turns; `times its units` is the time over that of plain matrix products of the same shapes
in the same run, as many as the side needs, and `times fewest units` over those that nobody can do without. TFLOP/s
counts the latter. Peak memory is above the inputs, results included; what was planned does not include results. Errors:
rms in nats, relative norm for gradients and attention.
"""


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no message"
