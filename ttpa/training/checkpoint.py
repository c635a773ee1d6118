"""Checkpoints: folders that are whole or do not count, whatever happens while they are written.

    step-00000012/
      rank-00000-000.safetensors ...    trained weights and optimizer state: what each process holds of them
      state.json                        sizes and checksums of these files, the state of the loop, random states,
                                        versions, and the fingerprint, which says whose checkpoint it is

Nothing in them is pickled. A checkpoint is written under a temporary name, and renamed once all of it is on the disk.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import textwrap
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from ttpa.errors import InputError
from ttpa.training.random_state import random_state, set_random_state
from ttpa.training.shards import ShardReader, write_shards
from ttpa.training.trained import load_trained, optimizer_groups, trained_tensors
from ttpa.world import World

STATE = "state.json"
PACKAGES = ("torch", "transformers", "safetensors")
CHUNK = 2**22
Record = dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in a folder of their own; all processes of the run call each method together.

    `fingerprint` names, as JSON values, all that a run must share with a checkpoint to go on from it: data, model and
    loss, also the hash of weights that are frozen, as only trained ones are saved; not the number of processes. Kept
    are the `keep_last` newest checkpoints, and the `keep_best` ones of the lowest score.
    """

    def __init__(
        self, folder: Path, *, world: World, fingerprint: Mapping[str, Any], keep_last: int = 2, keep_best: int = 0
    ) -> None:
        assert keep_last >= 1 and keep_best >= 0
        self.folder, self.world = folder, world
        self.fingerprint: Record = json.loads(json.dumps(fingerprint))
        self.keep_last, self.keep_best = keep_last, keep_best
        self._verified: dict[Path, Record] = {}

    def save(
        self,
        step: int,
        *,
        policy: nn.Module,
        optimizer: Optimizer,
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        score: float | None = None,
    ) -> Path:
        """Write the checkpoint of a step, delete those that are kept no longer, and return its folder.

        It holds the trained parameters, persistent buffers, state and options of the optimizer, the random states,
        `state` (JSON values) and `tensors` (sharded ones, or the same in each process). A whole checkpoint of this step
        stays as it is. Raises InputError where it cannot be written, on a full disk say; earlier ones are kept then.
        """
        final = self.folder / f"step-{step:08}"
        if self.world.any(self.world.main and final.exists()):
            record, problem = self._inspect(final)
            if problem is None:
                self._check(final, record)
                return final
        temporary = self.folder / f".{final.name}.tmp"
        share = temporary / f"rank-{self.world.rank:05}.json"
        with self._together():
            if self.world.main:
                self.folder.mkdir(parents=True, exist_ok=True)
                for path in self.folder.glob(".step-*"):  # left by a run that was cut off
                    shutil.rmtree(path)
                temporary.mkdir()
        with self._together(temporary):
            values = trained_tensors(policy, optimizer) | {f"tensors/{n}": t for n, t in (tensors or {}).items()}
            files = {path.name: _seal(path) for path in write_shards(values, temporary, rank=self.world.rank)}
            share.write_text(json.dumps({"files": files, "random": random_state(self.world.device)}))
        with self._together(temporary):
            if self.world.main:
                shares = [temporary / f"rank-{rank:05}.json" for rank in range(self.world.size)]
                found = [json.loads(path.read_text()) for path in shares]
                record = {
                    "step": step,
                    "score": score,
                    "fingerprint": self.fingerprint,
                    "versions": {package: version(package) for package in PACKAGES},
                    "state": state,
                    "groups": optimizer_groups(policy, optimizer),
                    "random": [part["random"] for part in found],
                    "files": {name: seal for part in found for name, seal in part["files"].items()},
                }
                (temporary / STATE).write_text(_signed(record))
                for path in shares:
                    path.unlink()
                _seal(temporary / STATE)
                _sync_folder(temporary)
                if final.exists():  # and is broken
                    _remove(final)
                temporary.rename(final)
                _sync_folder(self.folder)
        with self._together():
            if self.world.main:
                self._delete_old(final)
        return final

    def latest(self) -> Path | None:
        """The newest whole checkpoint, None where there is none at all; one that is cut off or corrupt is named in a
        warning, and the one before it taken. Raises InputError where all of them are, so that nobody begins anew over
        what may still be saved."""
        paths = self._newest_first()
        for path in paths:
            _, problem = self._inspect(path)
            if problem is None:
                return path
            if self.world.main:
                warnings.warn(f"{path}: {problem}; the checkpoint before it is taken", stacklevel=2)
        if paths:
            raise InputError(
                "there are checkpoints and none of them is whole: look at the disk, and move them away or give "
                "--resume none to begin anew",
                path=self.folder,
            )
        return None

    def state(self, path: Path) -> Record:
        """The `state` of a checkpoint, before there is a policy to load it into. Raises InputError for one that is
        broken, that was made by another run (naming what differs), or that is older than a whole one of this folder."""
        return self._record(path)["state"]

    def load(self, path: Path, *, policy: nn.Module, optimizer: Optimizer) -> tuple[Record, dict[str, Tensor]]:
        """Put a checkpoint into a policy, its optimizer and the random number generators, bit by bit, over any number
        of processes, and return `state` and `tensors` (whole, on the CPU) as they were when it was saved.

        A process that the checkpoint does not know keeps its random states. Raises InputError as `state` does, and
        where the policy or its optimizer have other tensors.
        """
        record = self._record(path)
        with ShardReader(path / name for name in record["files"]) as shards:
            try:
                load_trained(policy, optimizer, shards, record["groups"])
            except InputError as error:
                raise InputError(
                    f"{error}: give the same model and options again, or --resume none", path=path
                ) from None
            tensors = {name: shards.whole(f"tensors/{name}") for name in shards.names("tensors/")}
        if self.world.rank < len(record["random"]):
            set_random_state(record["random"][self.world.rank], self.world.device)
        return record["state"], tensors

    def _record(self, path: Path) -> Record:
        record, problem = self._inspect(path)
        if problem is not None:
            raise InputError(f"{problem}; --resume auto takes the newest whole checkpoint", path=path)
        self._check(path, record)
        return record

    def _check(self, path: Path, record: Record) -> None:
        """Raise InputError where going on from a checkpoint would mix two runs."""
        old, new = record["fingerprint"], self.fingerprint
        differences = [
            # of what is large there are hashes, which say nothing to a reader
            f"the {name} changed"
            if " of " in name
            else f"{name} was {_short(old.get(name))} and is {_short(new.get(name))}"
            for name in {**old, **new}
            if old.get(name) != new.get(name)
        ]
        if differences:
            raise InputError(
                f"was made with other settings: {', '.join(differences)}; give the same again to go on from it, or "
                "--resume none and another --output to begin anew",
                path=path,
            )
        if path.resolve().parent == self.folder.resolve():
            for other in self._newest_first():
                if other.name > path.name and self._inspect(other)[1] is None:
                    raise InputError(
                        f"{other.name} in this folder is newer: move it away to go on from the older one, or choose "
                        "another --output",
                        path=path,
                    )

    def _inspect(self, path: Path) -> tuple[Record, str | None]:
        """What state.json of a checkpoint says, and what is wrong with the checkpoint, None where it is whole. Each
        process reads its share of the files."""
        if path not in self._verified:
            record = _verified(self.world.share_text(_text(path / STATE) if self.world.main else None))
            if record is None:
                return {}, f"{STATE} is missing, cut off or corrupt"
            mine = set(list(record["files"])[self.world.rank :: self.world.size])
            broken = self.world.sum(
                {name: float(name in mine and not _intact(path / name, seal)) for name, seal in record["files"].items()}
            )
            names = [name for name, count in broken.items() if count]
            if names:
                return {}, f"{', '.join(names)}: missing, cut off or corrupt"
            self._verified[path] = record
        return self._verified[path], None

    def _delete_old(self, new: Path) -> None:
        """Delete what is kept no longer; `new`, which is whole, always is. Not read to the end: that takes long."""
        whole: dict[Path, Record] = {}
        for path in self._listed():
            record = _verified(_text(path / STATE))
            if record and all(_size(path / name) == seal["bytes"] for name, seal in record["files"].items()):
                whole[path] = record
        scores = {path: record["score"] for path, record in whole.items() if record["score"] is not None}
        best = sorted((path for path, score in scores.items() if math.isfinite(score)), key=lambda path: scores[path])
        kept = {new, *list(whole)[: self.keep_last], *best[: self.keep_best]}
        for path in self._listed():
            if path not in kept:
                _remove(path)

    def _newest_first(self) -> list[Path]:
        """The checkpoints that process 0 finds, whole or not, in all processes."""
        names = [path.name for path in self._listed()] if self.world.main else []
        return [self.folder / name for name in json.loads(self.world.share_text(json.dumps(names)))]

    def _listed(self) -> list[Path]:
        found = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name)]
        return sorted(found, reverse=True)

    @contextmanager
    def _together(self, temporary: Path | None = None) -> Iterator[None]:
        """A part of saving that succeeds in all processes or raises InputError in all of them."""
        problem: Exception | None = None
        try:
            yield
        except (OSError, SafetensorError) as error:
            problem = error
        if self.world.any(problem is not None):
            if temporary is not None and self.world.main:
                shutil.rmtree(temporary, ignore_errors=True)
            self.world.barrier()
            raise InputError(
                f"a checkpoint cannot be written: {problem or 'another process says why'}; earlier ones are kept: make "
                "room in a folder that all processes share, and --resume auto goes on",
                path=self.folder,
            ) from problem


def _signed(record: Record) -> str:
    text = json.dumps(record)
    return json.dumps({"crc32": zlib.crc32(text.encode()), "checkpoint": json.loads(text)})


def _verified(text: str) -> Record | None:
    """What `_signed` wrote, None for anything else."""
    try:
        found = json.loads(text)
        whole = found["crc32"] == zlib.crc32(json.dumps(found["checkpoint"]).encode())
    except (ValueError, KeyError, TypeError):
        return None
    return found["checkpoint"] if whole else None


def _text(path: Path) -> str:
    """The text of a file, none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _seal(path: Path) -> Record:
    """Size and checksum of a file that is on the disk when this returns."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "crc32": _crc32(path)}


def _intact(path: Path, seal: Record) -> bool:
    try:
        return _size(path) == seal["bytes"] and _crc32(path) == seal["crc32"]
    except OSError:  # a part of the disk that cannot be read
        return False


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _crc32(path: Path) -> int:
    found = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            found = zlib.crc32(chunk, found)
    return found


def _sync_folder(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove(path: Path) -> None:
    """Delete a checkpoint, which does not count from the first moment on."""
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _short(value: Any) -> str:
    return textwrap.shorten(json.dumps(value, ensure_ascii=False), 60, placeholder=" ...")
