"""Writing files so that a reader finds the old one or the new one, never half of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ttpa.errors import InputError


@contextmanager
def atomic_write(path: Path | str) -> Iterator[TextIO]:
    """A UTF-8 text file to write to, which gets the name `path` when the block ends, and none when it raises; folders
    on the way are made. Raises InputError where the file cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # a lone surrogate, which a model may write, becomes the escape that JSON has for it
            with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # else a machine that goes down may leave the new name without its content
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", path=path) from error
