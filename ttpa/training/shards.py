"""Tensors of a training run in safetensors files that any number of processes write together and read again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ttpa.errors import InputError

LARGEST_FILE = 4 * 2**30
"""Bytes of one file, where it holds several tensors: as much CPU memory is taken while it is written."""


@dataclass(frozen=True)
class Piece:
    """The part of a tensor of `shape` that this process holds: `local`, which begins at `offset`."""

    shape: list[int]
    offset: list[int]
    local: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Piece:
        """The piece of a tensor, which shares its memory; all of it where the tensor is not sharded."""
        if not isinstance(tensor, DTensor):
            return cls(list(tensor.shape), [0] * tensor.ndim, tensor.detach())
        (chunk,) = tensor.__create_chunk_list__()
        return cls(list(tensor.shape), list(chunk.offsets), tensor.to_local().detach())


def write_shards(tensors: Mapping[str, Tensor], folder: Path, *, rank: int) -> list[Path]:
    """Write what this process holds of tensors and return the files. Of a part that several processes hold, the first
    of them writes it; a tensor that is not sharded is written by rank 0. Raises OSError or SafetensorError."""
    paths: list[Path] = []
    for group in _files({name: Piece.of(t) for name, t in tensors.items() if _writes(t, rank)}):
        places = {
            name: {"shape": piece.shape, "offset": piece.offset, "dtype": str(piece.local.dtype).removeprefix("torch.")}
            for name, piece in group.items()
        }
        # copies: safetensors takes contiguous tensors only, and none that share memory
        values = {
            name: piece.local.to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, piece in group.items()
        }
        paths.append(folder / f"rank-{rank:05}-{len(paths):03}.safetensors")
        save_file(values, paths[-1], metadata={"places": json.dumps(places)})
    return paths


class ShardReader(ExitStack):
    """The tensors in the files of `write_shards`, whoever wrote them: by name, `shapes` of the whole tensors and
    `dtypes`. A context manager that holds the files open; of each file, only what is asked for is read."""

    def __init__(self, paths: Iterable[Path]) -> None:
        super().__init__()
        self.shapes: dict[str, list[int]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._pieces: dict[str, list[tuple[Any, list[int]]]] = {}
        for path in paths:
            file = self.enter_context(safe_open(path, framework="pt"))  # type: ignore[no-untyped-call]
            for name, place in json.loads(file.metadata()["places"]).items():
                self.shapes[name], self.dtypes[name] = place["shape"], getattr(torch, place["dtype"])
                self._pieces.setdefault(name, []).append((file, place["offset"]))

    def names(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`, without it."""
        return [name.removeprefix(prefix) for name in self.shapes if name.startswith(prefix)]

    def whole(self, name: str) -> Tensor:
        """A tensor in CPU memory."""
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self.read(name, tensor)
        return tensor

    def read(self, name: str, into: Tensor) -> None:
        """Fill a tensor, or the part of it that this process holds, bit by bit as it was written. Raises InputError
        where it has another shape or dtype, or where a part is in none of the files."""
        if (list(into.shape), into.dtype) != (self.shapes[name], self.dtypes[name]):
            raise InputError(
                f"{name} is {self.dtypes[name]} {self.shapes[name]} in the checkpoint, and {into.dtype} "
                f"{list(into.shape)} here"
            )
        piece = Piece.of(into)
        missing = piece.local.numel()
        for file, offset in self._pieces[name]:
            source = file.get_slice(name)
            first = [max(*ends) for ends in zip(offset, piece.offset, strict=True)]
            stored_end = [o + n for o, n in zip(offset, source.get_shape(), strict=True)]
            wanted_end = [o + n for o, n in zip(piece.offset, piece.local.shape, strict=True)]
            end = [min(*ends) for ends in zip(stored_end, wanted_end, strict=True)]
            if all(a < b for a, b in zip(first, end, strict=True)):
                all_of_it = first == offset and end == stored_end
                part = file.get_tensor(name) if all_of_it else source[_slices(first, end, offset)]
                piece.local[_slices(first, end, piece.offset)].copy_(part)
                missing -= part.numel()
        if missing:
            raise InputError(f"{missing} values of {name} are in none of the checkpoint's files")


def _slices(first: list[int], end: list[int], offset: list[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(first, end, offset, strict=True))


def _writes(tensor: Tensor, rank: int) -> bool:
    """Whether this process writes its part of a tensor."""
    if not isinstance(tensor, DTensor):
        return rank == 0
    coordinates = tensor.device_mesh.get_coordinate()
    assert coordinates is not None, "a tensor is sharded over other processes"
    copies = [c for c, place in zip(coordinates, tensor.placements, strict=True) if place.is_replicate()]
    return not any(copies) and tensor.to_local().numel() > 0


def _files(pieces: Mapping[str, Piece]) -> Iterator[dict[str, Piece]]:
    """The pieces in groups of at most LARGEST_FILE bytes."""
    group: dict[str, Piece] = {}
    size = 0
    for name, piece in pieces.items():
        if group and size + piece.local.nbytes > LARGEST_FILE:
            yield group
            group, size = {}, 0
        group[name] = piece
        size += piece.local.nbytes
    if group:
        yield group
