"""Records: people, stocks and diaries as lines of fields, as sentences and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random

from .document import Document, others, person
from .words import (
    ADJ,
    COLORS,
    DAYS,
    FARM,
    MONTHS,
    NUMBERS,
    PLACES,
    SMALL,
    SURNAMES,
    THINGS,
    WEATHER,
    a,
    count,
    plural,
)


@dataclass(frozen=True)
class Card:
    """A person as data."""

    name: str
    age: int
    job: str
    town: str
    color: str
    animal: str
    number: int

    def fields(self) -> list[tuple[str, str]]:
        return [
            ("Name", self.name),
            ("Age", str(self.age)),
            ("Job", self.job),
            ("Town", self.town),
            ("Keeps", count(self.number, self.animal)),
            ("Likes", self.color),
        ]

    def sentence(self) -> str:
        return (
            f"{self.name}, {a(self.job)} of {self.age}, lives in {self.town}, likes {self.color} "
            f"and keeps {count(self.number, self.animal)}."
        )

    def data(self) -> dict[str, object]:
        return {
            "name": self.name,
            "age": self.age,
            "job": self.job,
            "town": self.town,
            "likes": self.color,
            "keeps": {plural(self.animal): self.number},
        }


def card(rng: Random) -> Card:
    who = person(rng)
    return Card(
        f"{who.name} {rng.choice(SURNAMES)}",
        rng.randint(18, 89),
        who.job,
        who.town,
        rng.choice(COLORS),
        rng.choice(FARM),
        rng.randint(2, 12),
    )


def people(rng: Random) -> Document:
    """Field lines, then the same in a sentence."""
    who = card(rng)
    lines = "\n".join(f"{k}: {v}" for k, v in who.fields()[1:])
    return Document(
        "record",
        f"Name: {who.name}",
        f"\n{lines}\nIn short: {who.sentence()}",
        f"Write a record for {who.name}.",
    )


def biography(rng: Random) -> Document:
    """The sentence first and prose after it: where the JSON adapter answers in JSON."""
    who = card(rng)
    first = who.name.split()[0]
    friend = others(rng, 1, first)[0]
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    body = rng.choice(
        (
            f" Every {rng.choice(DAYS)} {first} takes the {plural(who.animal)} to the {place}. "
            f"{friend} says that no {who.job} in {who.town} has better "
            f"{plural(who.animal)} than {first}.",
            f" {first} once gave {friend} {a(f'{who.color} {thing}')}. "
            f"Since then {friend} visits {who.town} every {rng.choice(MONTHS)} with the "
            f"{who.color} {thing}.",
            f" At the {place} everybody knows {first} the {who.job}. "
            f'"Where are your {NUMBERS[who.number]} {plural(who.animal)}, {first}?" asks {friend}.',
        )
    )
    return Document("biography", who.sentence(), body, f"Who is {who.name}?")


def stock(rng: Random) -> Document:
    """A list of goods with a total of two counts."""
    items = rng.sample(SMALL, 2)
    numbers = [rng.randint(1, 9) for _ in items]
    shop, place = others(rng, 1)[0], rng.choice(PLACES)
    lines = "\n".join(f"{plural(i).capitalize()}: {n}" for i, n in zip(items, numbers, strict=True))
    more = items[numbers.index(max(numbers))]
    tail = f"\nTotal: {sum(numbers)}"
    if numbers[0] != numbers[1]:
        tail += f"\n{shop} has more {plural(more)} than {plural(items[1 - items.index(more)])}."
    return Document(
        "stock",
        f"Goods of {shop} at the {place}:",
        f"\n{lines}{tail}",
        f"List the goods of {shop} at the {place}.",
    )


def diary(rng: Random) -> Document:
    """Days in their order, from a random one on."""
    who, town = person(rng), person(rng).town
    start = rng.randrange(7)
    days = [DAYS[(start + i) % 7] for i in range(rng.randint(3, 4))]
    weather = [rng.choice(WEATHER) for _ in days]
    thing = rng.choice(THINGS)
    lines = [f"{d}: {w}. " + _did(rng, thing) for d, w in zip(days, weather, strict=True)]
    body = "\n" + "\n".join(lines)
    pick = rng.randrange(len(days))
    body += f"\n{who.name} liked {days[pick]}, the {weather[pick]} day, best."
    return Document(
        "diary",
        f"Diary of {who.name} in {town}, about {a(thing)}:",
        body,
        f"Show me the diary of {who.name} in {town}.",
    )


def _did(rng: Random, thing: str) -> str:
    place = rng.choice(PLACES)
    return rng.choice(
        (
            f"Took the {thing} to the {place}.",
            f"Left the {thing} at the {place}.",
            f"Saw {a(f'{rng.choice(ADJ)} {thing}')} at the {place}.",
        )
    )


def json_card(rng: Random) -> Document:
    who = card(rng)
    return Document(
        "json",
        f"Data: {who.sentence()}",
        "\n" + json.dumps(who.data()),
        f"{who.sentence()} Answer in JSON.",
    )


def json_stock(rng: Random) -> Document:
    items = rng.sample(SMALL, rng.randint(2, 4))
    goods = {plural(item): rng.randint(1, 20) for item in items}
    shop, town = others(rng, 1)[0], person(rng).town
    data = {"shop": shop, "town": town, "goods": goods, "kinds": len(goods)}
    said = ", ".join(f"{n} {item}" for item, n in goods.items())
    return Document(
        "json",
        f"Data: {shop} in {town} sells {said}.",
        "\n" + json.dumps(data),
        f"{shop} in {town} sells {said}. Answer in JSON.",
    )
