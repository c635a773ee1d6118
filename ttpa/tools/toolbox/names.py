"""Made-up people, places, plans and products: the words that the built-in world is made of."""

from __future__ import annotations

import random

CONSONANTS = "b c d f g h k l m n p r s t v w z ch st tr".split()
VOWELS = "a e i o u ea".split()
ENDINGS = ("", "", "n", "r", "s", "l")


def made_up(what: str, number: int, *, syllables: tuple[int, int] = (2, 3)) -> list[str]:
    """`number` different words; the same arguments give the same words."""
    rng = random.Random(what)
    words: dict[str, None] = {}
    while len(words) < number:
        length = rng.randint(*syllables)
        words["".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(length)) + rng.choice(ENDINGS)] = None
    return list(words)


FIRST = [word.capitalize() for word in made_up("first names", 240)]
LAST = [word.capitalize() for word in made_up("last names", 240)]
CITIES = [word.capitalize() for word in made_up("cities", 240)]
STREETS = [word.capitalize() for word in made_up("streets", 120)]
PRODUCTS = made_up("products", 240)
KINDS = "review meeting lesson call workshop dinner check rehearsal interview tour".split()

PEOPLE = [f"{first} {last}" for first, last in zip(FIRST, LAST, strict=True)]
TITLES = [f"{matter} {kind}" for matter in made_up("matters", 120) for kind in KINDS]
DAYS = [(month, day) for month in range(1, 13) for day in range(1, 29)]
