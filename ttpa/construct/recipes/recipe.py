"""What a recipe is.

A recipe is a generator in the order of reversed construction: it draws values, yields calls (a list is one turn),
gets back what the executed tools said, and only at the end returns the question that all of this answers, and the
answer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from ttpa.construct.values import Values
from ttpa.tools.call import Call
from ttpa.tools.toolbox import Toolbox

Results = list[dict[str, Any]]
Steps = Generator[list[Call], Results, tuple[str, str]]
Recipe = Callable[[Values, Toolbox], Steps]


class Unusable(Exception):
    """The drawn scenario does not work out in this world; draw another."""


def succeeded(results: Results) -> dict[str, Any]:
    """The first result of a turn; raises Unusable if a call of the turn failed."""
    if any("error" in result for result in results):
        raise Unusable
    return results[0]
