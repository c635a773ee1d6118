"""Argument values and the words that people say for them: the value goes into the call, the words into the question."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ttpa.tools.toolbox import names

T = TypeVar("T")
Said = tuple[T, str]

MONTHS = ("January February March April May June July August September October November December").split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
HOURS = [NUMBERS[12], *NUMBERS[1:12]]
THINGS = "keys tickets cake report parcel printer invoice slides ladder bicycle guitar passport".split()
STATES = [
    "in the car",
    "on the table",
    "nearly done",
    "at my desk",
    "with the neighbour",
    "downstairs",
    "gone",
    "ready",
]
CURRENCIES = {
    "EUR": ("€{}", "{} euros", "{} EUR"),
    "USD": ("${}", "{} dollars", "{} USD"),
    "GBP": ("£{}", "{} pounds", "{} quid"),
}


def held_out(items: Sequence[T], *, share: int = 4) -> tuple[list[T], list[T]]:
    """Cut a list into what training may show and what it never shows: one of `share` items is held out."""
    return [x for i, x in enumerate(items) if i % share], [x for i, x in enumerate(items) if i % share == 0]


def ordinal(day: int) -> str:
    """1st, 2nd, 3rd, 4th, ..."""
    suffix = "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


FIRST, LAST = held_out(names.FIRST), held_out(names.LAST)
TITLES, CITIES, STREETS = held_out(names.TITLES), held_out(names.CITIES), held_out(names.STREETS)
PRODUCTS, DAYS = held_out(names.PRODUCTS), held_out(names.DAYS)
MESSAGES = held_out(
    [f"the {thing} {'are' if thing.endswith('s') else 'is'} {state}" for thing in THINGS for state in STATES]
)


class Values:
    """Draws values for one dialogue. With `fresh`, names, titles, cities, products and dates are those that training
    never shows; with `new_words`, phrases come from those kept for testing."""

    def __init__(self, rng: random.Random, *, fresh: bool, new_words: bool) -> None:
        self.rng, self.new_words = rng, new_words
        side = 1 if fresh else 0
        self.firsts, self.lasts = FIRST[side], LAST[side]
        self.titles, self.cities, self.streets = TITLES[side], CITIES[side], STREETS[side]
        self.messages, self.days = MESSAGES[side], DAYS[side]
        self.products = rng.sample(PRODUCTS[side], 20)  # what the shop has

    def phrase(self, seen: Sequence[str], unseen: Sequence[str], **said: str) -> str:
        """One way to put it: a template of those that training shows, or of those kept for testing, filled in."""
        return self.rng.choice(unseen if self.new_words else seen).format(**said)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def word(self, said: Mapping[str, Sequence[str]]) -> Said[str]:
        """A value of an enum and one of the ways to say it."""
        value = self.rng.choice(list(said))
        return value, self.rng.choice(said[value])

    def date(self, iso: str | None = None) -> Said[str]:
        """A day of 2026 in ISO form: this one, or any."""
        month, day = (int(iso[5:7]), int(iso[8:])) if iso else self.rng.choice(self.days)
        name = MONTHS[month - 1]
        ways = (
            f"{name} {day}",
            f"{day} {name}",
            f"the {ordinal(day)} of {name}",
            f"{day}.{month}.",
            f"{name[:3]} {day}",
        )
        return f"2026-{month:02}-{day:02}", self.rng.choice(ways)

    def time(self) -> Said[str]:
        """A quarter of an hour between 7:00 and 21:45, as HH:MM."""
        hour, minute = self.rng.randint(7, 21), self.rng.choice((0, 15, 30, 45))
        half = "am" if hour < 12 else "pm"
        part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
        spoken = {
            0: f"{HOURS[hour % 12]} o'clock {part}",
            15: f"quarter past {HOURS[hour % 12]} {part}",
            30: f"half past {HOURS[hour % 12]} {part}",
            45: f"quarter to {HOURS[(hour + 1) % 12]} {part}",
        }[minute]
        short = f"{hour % 12 or 12}{f':{minute:02}' if minute else ''} {half}"
        return f"{hour:02}:{minute:02}", self.rng.choice((f"{hour}:{minute:02}", short, spoken))

    def minutes(self) -> Said[int]:
        """A length of time in minutes."""
        hours, rest = divmod(self.rng.choice((15, 20, 30, 45, 60, 75, 90, 105, 120, 150, 180)), 60)
        total = 60 * hours + rest
        ways = [f"{total} minutes", f"{total} min"]
        if rest == 0:
            ways += ["an hour" if hours == 1 else f"{NUMBERS[hours]} hours"] * 2
        if rest == 30:
            whole = {0: "half an hour", 1: "an hour and a half"}.get(hours, f"{NUMBERS[hours]} and a half hours")
            ways += [whole] * 2
        if rest == 15 and hours:
            ways += [f"{'an hour' if hours == 1 else NUMBERS[hours] + ' hours'} and a quarter"]
        if rest == 45 and not hours:
            ways += ["three quarters of an hour"]
        return total, self.rng.choice(ways)

    def count(self, low: int = 2, high: int = 9) -> Said[int]:
        """A small number, in digits or in words."""
        number = self.rng.randint(low, high)
        ways = [str(number), NUMBERS[number]] + (["a couple of"] if number == 2 else [])
        return number, self.rng.choice(ways)

    def money(self) -> Said[dict[str, Any]]:
        """An amount in one of three currencies, whole or with a half."""
        currency = self.rng.choice(list(CURRENCIES))
        whole, half = self.rng.randint(5, 12) if self.chance(0.4) else self.rng.randint(13, 300), self.chance(0.25)
        amount = whole + 0.5 if half else whole
        digits = f"{whole}.50" if half else str(whole)
        ways = [way.format(digits) for way in CURRENCIES[currency]]
        if whole < len(NUMBERS):
            ways += [CURRENCIES[currency][1].format(NUMBERS[whole] + (" and a half" if half else ""))] * 2
        return {"amount": amount, "currency": currency}, self.rng.choice(ways)

    def person(self) -> str:
        return f"{self.rng.choice(self.firsts)} {self.rng.choice(self.lasts)}"

    def people(self, number: int) -> list[str]:
        """So many different people."""
        return [f"{first} {self.rng.choice(self.lasts)}" for first in self.rng.sample(self.firsts, number)]

    def digits(self, number: int) -> str:
        return "".join(self.rng.choice("0123456789") for _ in range(number))

    def listed(self, items: Sequence[str]) -> str:
        """a, b and c."""
        return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
