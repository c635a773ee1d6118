"""The one exception that means: the user gave us something that we cannot use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class InputError(ValueError):
    """Bad input from the user: a file, a row, an option or a model.

    The message says where (`file:line` when there is one), what was wrong and what to do about it. Commands print it
    without a traceback and exit with code 2; library users can catch it as a `ValueError`.
    """

    def __init__(self, problem: str, *, path: Path | str | None = None, line: int | None = None) -> None:
        place = "" if path is None else f"{path}:{line}: " if line is not None else f"{path}: "
        super().__init__(place + problem)


OnError = Callable[[InputError], None]
"""Takes the errors of single rows from a reader that goes on behind them."""
