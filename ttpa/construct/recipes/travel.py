"""What people want when they travel."""

from __future__ import annotations

from typing import Any

from ttpa.construct.recipes.recipe import Steps, succeeded
from ttpa.construct.values import Values
from ttpa.tools.call import Call
from ttpa.tools.toolbox import Toolbox

CABIN = {
    "economy": ("in economy", "in the cheap seats", "in coach"),
    "business": ("in business class", "with room to work"),
    "first": ("in first class", "at the very front", "in the best class"),
}
SEAT = {
    "window": ("with a view", "at the window"),
    "aisle": ("on the aisle", "where I can stretch my legs"),
    "any": ("in any seat", "wherever there is room"),
}
UNITS = {"metric": ("in Celsius", "in metric units"), "imperial": ("in Fahrenheit", "in imperial units")}
SIZE = {"small": ("small", "compact"), "medium": ("medium", "mid-size"), "large": ("large", "roomy")}


def book_flight(v: Values, box: Toolbox) -> Steps:
    (origin, destination), (date, on) = v.rng.sample(v.cities, 2), v.date()
    search: dict[str, Any] = {"origin": origin, "destination": destination, "date": date}
    extra = ""
    if v.chance(0.5):
        search["cabin"], cabin = v.word(CABIN)
        extra += f" {cabin}"
    if v.chance(0.4):
        search["passengers"], many = v.count()
        extra += f" for {many} people"
    flight = succeeded((yield [Call("search_flights", search)]))
    book: dict[str, Any] = {"flight_id": flight["flight_id"]}
    wish = ""
    if v.chance(0.5):
        book["seat"], seat = v.word(SEAT)
        wish += f", {seat}"
    if v.chance(0.4):
        book["bags"], bags = v.count()
        wish += f", {bags} bags"
    succeeded((yield [Call("book_flight", book)]))
    question = v.phrase(
        [
            "Book a flight from {o} to {d} on {on}{x}{w}.",
            "I fly from {o} to {d} on {on}{x}; book it{w}.",
            "Get me to {d} from {o}{x} on {on}{w}.",
        ],
        ["On {on} I have to go from {o} to {d} by plane{x}{w}."],
        o=origin,
        d=destination,
        on=on,
        x=extra,
        w=wish,
    )
    return question, f"The flight costs {flight['fare']} EUR."


def book_hotel(v: Values, box: Toolbox) -> Steps:
    city, (date, on), (nights, long) = v.rng.choice(v.cities), v.date(), v.count()
    arguments: dict[str, Any] = {"city": city, "check_in": date, "nights": nights}
    extra = ""
    if v.chance(0.4):
        arguments["rooms"], rooms = v.count()
        extra += f", {rooms} rooms"
    if v.chance(0.4):
        arguments["breakfast"], breakfast = v.rng.choice(
            [(True, "with breakfast"), (False, "no breakfast"), (True, "breakfast included")]
        )
        extra += f", {breakfast}"
    result = succeeded((yield [Call("book_hotel", arguments)]))
    question = v.phrase(
        [
            "Book a hotel in {c} from {on} for {n} nights{x}.",
            "I stay {n} nights in {c}, arriving on {on}{x}.",
            "Hotel in {c}: {on}, {n} nights{x}.",
        ],
        ["{n} nights in {c} starting on {on}, find me a bed{x}."],
        c=city,
        on=on,
        n=long,
        x=extra,
    )
    return question, f"The booking is {result['booking_id']}."


def rent_car(v: Values, box: Toolbox) -> Steps:
    city, (date, on), (time, at), (days, long), (size, kind) = (
        v.rng.choice(v.cities),
        v.date(),
        v.time(),
        v.count(),
        v.word(SIZE),
    )
    arguments = {"city": city, "pickup": {"date": date, "time": time}, "days": days, "size": size}
    result = succeeded((yield [Call("rent_car", arguments)]))
    question = v.phrase(
        [
            "Rent a {k} car in {c} for {n} days from {on}, {at}.",
            "I need a {k} car in {c} on {on} at {at} for {n} days.",
        ],
        ["A {k} car for {n} days, please: {c}, {on} at {at}."],
        k=kind,
        c=city,
        n=long,
        on=on,
        at=at,
    )
    return question, f"The booking is {result['booking_id']}."


def get_weather(v: Values, box: Toolbox) -> Steps:
    cities = v.rng.sample(v.cities, 2 if v.chance(0.3) else 1)
    common: dict[str, Any] = {}
    extra = ""
    if v.chance(0.5):
        common["days"], days = v.count()
        extra += f" for {days} days"
    if v.chance(0.4):
        common["units"], units = v.word(UNITS)
        extra += f" {units}"
    results = yield [Call("get_weather", {"city": city, **common}) for city in cities]
    question = v.phrase(
        ["What is the weather in {c}{x}?", "Forecast for {c}{x}, please.", "How warm is it in {c}{x}?"],
        ["Do I need a coat in {c}{x}?"],
        c=v.listed(cities),
        x=extra,
    )
    return question, f"{succeeded(results)['temperature']} degrees."
