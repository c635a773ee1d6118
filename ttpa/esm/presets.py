"""Which presets there are, and a user's own: a YAML file of penalties."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import yaml

from ttpa.config import nearest
from ttpa.errors import InputError
from ttpa.esm.errors import PENALTY, SEVERITY
from ttpa.esm.release import release
from ttpa.esm.rewards import binary, tl_training, toolrl
from ttpa.esm.strict import strict

FORMULAS = {"strict": strict, "release": release, "toolrl": toolrl, "tl_training": tl_training, "binary": binary}
NAMES = [*FORMULAS, "bfcl"]


def read_penalties(path: str | Path) -> dict[str, float]:
    """The penalty of every error code from a YAML file with lines `code: penalty`.

    A penalty is a number from 0 (does not count) to 1 (takes all of a call's score) or one of the words fatal, major
    and minor. Codes that the file does not name keep the penalty that `strict` has. The file is read again only when
    it has changed. Raises InputError with file and line for anything else.
    """
    path = Path(path)
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path=path) from None


@lru_cache(maxsize=16)
def _read(path: Path, modified: int) -> dict[str, float]:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"broken YAML: {problem}", path=path, line=mark.line + 1 if mark else None) from None
    if not isinstance(root, yaml.MappingNode):
        raise InputError("expected lines of the form `code: penalty`", path=path, line=1)
    given: dict[str, float] = {}
    for key, value in root.value:
        code, line = str(key.value), key.start_mark.line + 1
        if code not in PENALTY:
            close = nearest(code, PENALTY)
            hint = f"did you mean {close}?" if close else f"the codes are {', '.join(PENALTY)}"
            raise InputError(f"unknown error code {code!r}: {hint}", path=path, line=line)
        if code in given:
            raise InputError(f"{code} is given twice", path=path, line=line)
        given[code] = _penalty(value)
        if not 0.0 <= given[code] <= 1.0:
            expected = f"a number from 0 to 1 or one of {', '.join(SEVERITY)}"
            got = repr(value.value) if isinstance(value, yaml.ScalarNode) else "a nested value"
            raise InputError(f"{code}: expected {expected}, got {got}", path=path, line=line)
    return {**PENALTY, **given}


def _penalty(node: yaml.Node) -> float:
    if not isinstance(node, yaml.ScalarNode):
        return math.nan
    try:
        return SEVERITY[node.value] if node.value in SEVERITY else float(node.value)
    except ValueError:
        return math.nan
