"""A run that can be cut off at any moment: decisions in blocks, each block exact by itself, the file put together last.

What a block yields is a function of its decisions, the model and the options. So a block that was cut off is sampled
again from its start and gives the same lines, and the file does not depend on who sampled which block.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from ttpa.errors import InputError
from ttpa.files import atomic_write
from ttpa.sampling.report import SamplingReport
from ttpa.trees.io import tree_line
from ttpa.trees.record import PreferenceTree

State = Literal["new", "begun", "complete"]


class BlockedRun:
    """The files of a run: `output`, its report beside it (suffix .report.json), and until both are complete the folder
    `output`.parts with the lines of each block, a report of each block that is done, and run.json, which says whose
    parts they are."""

    def __init__(self, output: Path, *, num_blocks: int, fingerprint: Mapping[str, Any]) -> None:
        """A run over `num_blocks` blocks. `fingerprint` names all that the lines depend on, as JSON values."""
        self.output, self.num_blocks = output, num_blocks
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.report_path = output.with_suffix(".report.json")
        self.parts = output.with_name(output.name + ".parts")

    def state(self, *, overwrite: bool = False) -> State:
        """What there is of this run, without touching it. Raises InputError, naming what differs and what to do, where
        the output or the parts are those of something else, unless they may be overwritten."""
        begun = self._begun().get("fingerprint")
        if begun == self.fingerprint:
            return "begun"  # even with an output: that of an earlier run, or of this one, cut off at its very end
        if overwrite:
            return "new"
        if begun is not None:
            raise InputError(
                f"holds an unfinished run with other settings: {_differences(begun, self.fingerprint)}; give the same "
                "again to go on with it, --overwrite to drop it, or choose another --output",
                path=self.parts,
            )
        if not self.output.exists():
            return "new"
        report = _read(self.report_path)
        if report is None or "fingerprint" not in report:
            problem = f"exists, and there is no {self.report_path.name} that says how it was made"
        elif report["fingerprint"] == self.fingerprint:
            return "complete"
        else:
            problem = f"was made with other settings: {_differences(report['fingerprint'], self.fingerprint)}"
        raise InputError(f"{problem}; choose another --output, or give --overwrite", path=self.output)

    def begin(self, **held: Any) -> None:
        """Make the parts folder of a new run, in the place of any other. What is `held` about the machine is what all
        processes keep to, however the run goes on. The output of an earlier run stays until `finish`."""
        with self._kept(self.parts):
            self.clear()
            self.parts.mkdir(exist_ok=True)
            with atomic_write(self.parts / "run.json") as file:
                json.dump({"held": held, "fingerprint": self.fingerprint}, file, indent=2)

    def join(self) -> dict[str, Any]:
        """What the run that was begun holds; raises InputError where it is not this one."""
        begun = self._begun()
        if begun.get("fingerprint") != self.fingerprint:
            problem = "is not the folder of this run: all processes need the same settings and a folder that they share"
            raise InputError(problem, path=self.parts)
        return begun["held"]

    def finished(self, block: int) -> SamplingReport | None:
        """The report of a block, None where it is not done."""
        record = _read(self._report(block))
        if record is None or not self._lines(block).exists() or self._lines(block).stat().st_size != record["bytes"]:
            return None
        return SamplingReport.from_dict(record["report"])

    def write(self, block: int, trees: Iterable[PreferenceTree], report: SamplingReport) -> None:
        """Write the trees of a block, each at once, and at the end its report, with which the block is done. Raises
        InputError where the disk is full, and where another process is writing the same block."""
        path = self._lines(block)
        with self._kept(path):
            lines: FileIO = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by the with below)
        with lines:
            _lock(lines, path)
            with self._kept(path):
                lines.truncate(0)
            for tree in trees:
                with self._kept(path):
                    _write(lines, tree_line(tree).encode("utf-8", "backslashreplace"))
            with self._kept(path):
                os.fsync(lines.fileno())
                with atomic_write(self._report(block)) as file:
                    json.dump({"bytes": lines.tell(), "report": report.to_dict()}, file)

    def finish(self) -> SamplingReport:
        """Put the blocks together, write the report of all of them, and remove the parts. Raises InputError where the
        disk is full; nothing is lost then."""
        reports = []
        for block in range(self.num_blocks):
            report = self.finished(block)
            if report is None:
                raise InputError(f"block {block} is not there: all processes need a folder they share", path=self.parts)
            reports.append(report)
        merged = SamplingReport.merge(reports)
        with self._kept(self.output):
            with atomic_write(self.output) as file:
                for block in range(self.num_blocks):
                    with open(self._lines(block), "rb") as lines:
                        shutil.copyfileobj(lines, file.buffer)
                file.flush()
                os.fsync(file.fileno())
            with atomic_write(self.report_path) as file:
                json.dump({**merged.to_dict(), "fingerprint": self.fingerprint}, file, ensure_ascii=False, indent=2)
            self.clear()
        return merged

    def clear(self) -> None:
        """Remove the parts, if there are any, and nothing else that may lie in their folder."""
        # run.json goes first: without it, what a cut-off removal leaves behind is nobody's run
        for name in ("run.json", "block-*.json*", ".*.tmp"):
            for path in self.parts.glob(name):
                path.unlink()
        with suppress(OSError):
            self.parts.rmdir()

    def _begun(self) -> dict[str, Any]:
        return _read(self.parts / "run.json") or {}

    def _lines(self, block: int) -> Path:
        return self.parts / f"block-{block:05}.jsonl"

    def _report(self, block: int) -> Path:
        return self.parts / f"block-{block:05}.json"

    @contextmanager
    def _kept(self, path: Path) -> Iterator[None]:
        """Say of an error in writing what is left and how to go on."""
        try:
            yield
        except (OSError, InputError) as error:
            problem = error if isinstance(error, InputError) else f"{path}: cannot be written: {error.strerror}"
            raise InputError(f"{problem}; blocks that are done are kept: the same command goes on with them") from error


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What two fingerprints differ in."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)} and is {new.get(name)}" for name in names)


def _lock(file: FileIO, path: Path) -> None:
    """Keep other processes from writing the file until it is closed, however the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError("another process is writing it: wait for its end, or end it", path=path) from None
    except OSError:
        pass  # some network file systems have no locks


def _write(file: FileIO, data: bytes) -> None:
    """Write all of `data`; a full disk may take a part of it before it refuses the rest."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
