"""Log-probabilities of trees under a model that does not change, on disk, found again by what they depend on.

A cache is a folder with one folder a model, whose shards (safetensors) hold many trees each:
`keys [N, 16]` uint8, `starts [N + 1]` int64 and `logps [starts[N]]` fp32, where tree n has
`logps[starts[n] : starts[n + 1]]`, one value a completion token. A shard is written once and never changed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from transformers import PreTrainedModel

from ttpa.errors import InputError
from ttpa.hashes import hash_of_model, hash_of_tokenizer
from ttpa.trees.pack import completion_tokens
from ttpa.trees.record import PreferenceTree

KEY_BYTES = 16
OLD = 3600.0  # seconds; a shard is written in a few, so an older temporary file is that of a process that was killed


def model_key(model: PreTrainedModel, tokenizer: Any, *, dtype: torch.dtype) -> str:
    """What the log-probabilities of given token ids depend on: config and weights, template and vocabulary, and the
    dtype of compute. The hash is of whole weights (`hash_of_model`) and so the same on any number of processes; the
    names of the weights count, so that a model is hashed before an adapter is put around it."""
    return f"{hash_of_model(model)}-{hash_of_tokenizer(tokenizer)}-{str(dtype).removeprefix('torch.')}"


def content_key(tree: PreferenceTree) -> bytes:
    """What a model's log-probabilities of a tree depend on, prompt ids and nodes (parents, ids, what the model wrote),
    as 16 bytes of blake2b. Pairs, scores, weights and the name of the tree have no part in it."""
    sizes = [len(tree.prompt_ids), *chain.from_iterable((node.parent, len(node.ids)) for node in tree.nodes)]
    ids = chain(tree.prompt_ids, *(node.ids for node in tree.nodes))
    written = chain(*(node.trained or [1] * len(node.ids) for node in tree.nodes))
    numbers = np.array([len(tree.nodes), *sizes, *ids, *written], dtype="<i8")
    return hashlib.blake2b(numbers.tobytes(), digest_size=KEY_BYTES).digest()


class ReferenceCache:
    """The cached log-probabilities of one model; nothing is written before the first `write`.

    Any number of processes may read and write at the same time without locks: each writes shards of its own, under a
    temporary name first, and finds those of the others at the next `refresh`. `broken` names the shards that cannot be
    used and says why; what they held is unknown. Raises InputError for a folder that cannot be read and for a shard of
    another model.
    """

    def __init__(self, folder: Path | str, *, model_key: str) -> None:
        self.folder, self.model_key = Path(folder) / model_key, model_key
        self.broken: dict[Path, str] = {}
        self._logps: dict[Path, Any] = {}  # memory-mapped: a slice is read when it is asked for
        self._places: dict[bytes, list[tuple[Path, int, int]]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Find the shards that came since the last time, and check every byte of them."""
        try:
            paths = sorted(self.folder.glob("*.safetensors"))
            new = [path for path in paths if path not in self._logps and path not in self.broken]
            for path in new:
                try:
                    self._open(path)
                except (SafetensorError, _Broken) as error:
                    self.broken[path] = str(error)
        except OSError as error:
            raise InputError(f"cannot be read: {error}", path=self.folder) from error

    def get(self, tree: PreferenceTree, *, key: bytes | None = None) -> np.ndarray:
        """The log-probabilities in nats, fp32, of the completion tokens of all nodes in order, NaN where unknown; `key`
        is the tree's `content_key`, where the caller has it."""
        found = np.full(completion_tokens(tree), np.nan, dtype=np.float32)
        for path, start, end in self._places.get(content_key(tree) if key is None else key, ()):
            found = np.where(np.isnan(found), self._logps[path][start:end], found)
        return found

    def write(self, records: Mapping[bytes, np.ndarray], *, rank: int) -> Path:
        """Write one shard: for each content key the log-probabilities of all completion tokens, NaN where unknown.
        Raises InputError where it cannot be written; the cache is then as it was."""
        tensors: dict[str, np.ndarray] = {
            "keys": np.frombuffer(b"".join(records), dtype=np.uint8).reshape(-1, KEY_BYTES),
            "starts": np.cumsum([0, *map(len, records.values())], dtype=np.int64),
            "logps": np.concatenate(list(records.values()), dtype=np.float32),
        }
        checksum = _checksum(self.model_key, tensors)
        path = self.folder / f"{rank:05d}-{checksum[:16]}.safetensors"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(save(tensors, {"model_key": self.model_key, "checksum": checksum}))
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            problem = f"cannot be written: {error.strerror}; what the cache held before is still there"
            raise InputError(problem, path=path) from error
        return path

    def forget_broken(self, *, delete: bool) -> None:
        """Take the shards that cannot be used for new ones at the next `refresh`; with `delete`, which is for one of
        several processes, they are deleted first, and with them what a process left that was killed in the middle."""
        with suppress(OSError):  # of a cache that is only read; they are found broken again
            if delete:
                left = [path for path in self.folder.glob(".*.tmp") if time.time() - path.stat().st_mtime > OLD]
                for path in [*self.broken, *left]:
                    path.unlink(missing_ok=True)
        self.broken.clear()

    def _open(self, path: Path) -> None:
        shard = safe_open(path, framework="numpy")
        metadata = shard.metadata() or {}
        tensors = {name: shard.get_tensor(name) for name in ("keys", "starts", "logps")}
        if metadata.get("checksum") != _checksum(metadata.get("model_key", ""), tensors):
            raise _Broken("its contents are not those that were written")
        if metadata["model_key"] != self.model_key:
            raise InputError(
                f"holds log-probabilities of another model ({metadata['model_key']}, and this one is "
                f"{self.model_key}): move it to the folder that is named like its model, or delete it",
                path=path,
            )
        self._logps[path] = shard.get_slice("logps")
        bounds = zip(tensors["starts"][:-1].tolist(), tensors["starts"][1:].tolist(), strict=True)
        for key, (start, end) in zip(tensors["keys"], bounds, strict=True):
            self._places.setdefault(key.tobytes(), []).append((path, start, end))


class _Broken(Exception):
    """Why a shard cannot be used."""


def _checksum(model_key: str, tensors: Mapping[str, np.ndarray]) -> str:
    found = hashlib.blake2b(model_key.encode(), digest_size=32)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        found.update(np.ascontiguousarray(tensor).data)
    return found.hexdigest()
