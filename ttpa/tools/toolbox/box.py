"""The toolbox itself: a seeded state, tools dispatched by name from parsed arguments, results and errors as JSON."""

from __future__ import annotations

import copy
import random
from typing import Any

from jsonschema import Draft202012Validator

from ttpa.tools.call import Call
from ttpa.tools.toolbox import calendar, messages, names, shop, travel
from ttpa.tools.toolbox.tool import State, Tool, ToolError


class Toolbox:
    """An executable environment of calendar, messages, shop and travel tools over one JSON state.

    `seed` decides the initial state: the same seed gives the same state, and the same calls then give the same
    results. `people`, `titles`, `cities`, `products` and `days` (month, day) are what the state is made of; None
    takes the built-in lists. Nothing here reads a clock, a file or the network.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        people: list[str] | None = None,
        titles: list[str] | None = None,
        cities: list[str] | None = None,
        products: list[str] | None = None,
        days: list[tuple[int, int]] | None = None,
    ) -> None:
        rng = random.Random(seed)
        self.state: State = {
            **calendar.initial_state(rng, titles or names.TITLES, days or names.DAYS),
            **messages.initial_state(rng, people or names.PEOPLE),
            **shop.initial_state(rng, products or names.PRODUCTS),
            **travel.initial_state(rng, cities or names.CITIES),
        }
        domains = (calendar, messages, shop, travel)
        self.by_name: dict[str, Tool] = {tool.name: tool for domain in domains for tool in domain.TOOLS}

    @property
    def tools(self) -> list[dict[str, Any]]:
        """OpenAI function schemas of all tools."""
        return [tool.schema for tool in self.by_name.values()]

    def execute(self, call: Call) -> dict[str, Any]:
        """Run one call; never raises. Returns the result, or `{"error": code, "message": text}` after no change."""
        tool = self.by_name.get(call.name)
        if tool is None:
            return {"error": "unknown_tool", "message": f"there is no tool {call.name!r}"}
        for problem in Draft202012Validator(tool.parameters).iter_errors(call.arguments):
            return {"error": "invalid_arguments", "message": f"{problem.json_path}: {problem.message}"}
        before = copy.deepcopy(self.state)
        try:
            return copy.deepcopy(tool.run(self.state, copy.deepcopy(call.arguments)))
        except ToolError as error:
            self.state = before
            return {"error": error.code, "message": str(error)}

    def snapshot(self) -> State:
        """A deep copy of the state, for comparing what two sequences of calls led to."""
        return copy.deepcopy(self.state)
