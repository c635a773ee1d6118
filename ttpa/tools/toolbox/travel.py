"""Travel: flights, hotels, cars, weather."""

from __future__ import annotations

import random
from typing import Any

from ttpa.tools.toolbox.schemas import COUNT, DATE, FLAG, NAME, TIME, choice, record
from ttpa.tools.toolbox.tool import State, Tool, ToolError, find, new_id


def initial_state(rng: random.Random, cities: list[str]) -> State:
    """A mean temperature for every city; flights appear when they are searched for."""
    return {"climate": {city: rng.randint(-5, 32) for city in cities}, "flights": {}, "bookings": {}}


def _climate(state: State, city: str) -> int:
    if city not in state["climate"]:
        raise ToolError("not_found", f"no city {city!r}")
    return state["climate"][city]


def search_flights(state: State, arguments: dict[str, Any]) -> Any:
    if arguments["origin"] == arguments["destination"]:
        raise ToolError("conflict", "origin and destination are the same")
    fare = 60 + 3 * abs(_climate(state, arguments["origin"]) - _climate(state, arguments["destination"]))
    key = new_id(state["flights"], "f")
    state["flights"][key] = {**arguments, "fare": fare}
    return {"flight_id": key, "fare": fare}


def book_flight(state: State, arguments: dict[str, Any]) -> Any:
    find(state["flights"], arguments["flight_id"], "flight")
    key = new_id(state["bookings"], "b")
    state["bookings"][key] = arguments
    return {"booking_id": key}


def book_hotel(state: State, arguments: dict[str, Any]) -> Any:
    _climate(state, arguments["city"])
    key = new_id(state["bookings"], "b")
    state["bookings"][key] = {"rooms": 1, **arguments}
    return {"booking_id": key}


def rent_car(state: State, arguments: dict[str, Any]) -> Any:
    _climate(state, arguments["city"])
    key = new_id(state["bookings"], "b")
    state["bookings"][key] = arguments
    return {"booking_id": key}


def get_weather(state: State, arguments: dict[str, Any]) -> Any:
    celsius = _climate(state, arguments["city"])
    imperial = arguments.get("units") == "imperial"
    return {"temperature": round(celsius * 9 / 5 + 32) if imperial else celsius}


TOOLS = [
    Tool(
        "search_flights",
        "Search for a flight.",
        record(
            origin=NAME,
            destination=NAME,
            date=DATE,
            cabin=choice("economy", "business", "first"),
            passengers=COUNT,
            optional=("cabin", "passengers"),
        ),
        search_flights,
    ),
    Tool(
        "book_flight",
        "Book a flight that was found.",
        record(flight_id=NAME, seat=choice("window", "aisle", "any"), bags=COUNT, optional=("seat", "bags")),
        book_flight,
    ),
    Tool(
        "book_hotel",
        "Book a hotel.",
        record(city=NAME, check_in=DATE, nights=COUNT, rooms=COUNT, breakfast=FLAG, optional=("rooms", "breakfast")),
        book_hotel,
    ),
    Tool(
        "rent_car",
        "Rent a car.",
        record(city=NAME, pickup=record(date=DATE, time=TIME), days=COUNT, size=choice("small", "medium", "large")),
        rent_car,
    ),
    Tool(
        "get_weather",
        "Weather forecast for a city.",
        record(city=NAME, days=COUNT, units=choice("metric", "imperial"), optional=("days", "units")),
        get_weather,
    ),
]
