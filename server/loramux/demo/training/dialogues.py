"""Two people talking in turns; what one says, the other takes up."""

from __future__ import annotations

from random import Random

from .document import Document, others
from .words import (
    ADJ,
    ANIMALS,
    COLORS,
    DAYS,
    MOODS,
    NUMBERS,
    PLACES,
    SMALL,
    THINGS,
    TOWNS,
    WEATHER,
    a,
    both,
    count,
    plural,
)

# The lines of the two, the first speaker's first, and what they were about.
Topic = tuple[list[str], str]


def dialogue(rng: Random) -> Document:
    x, y = others(rng, 2)
    lines = [
        rng.choice((f"Good morning, {y}.", f"Hello, {y}!", f"There you are, {y}."))
        + " How are you today?"
    ]
    lines.append(f"I am {rng.choice(MOODS)}, {x}. And you?")
    topics = rng.sample((_lost, _meet, _count, _guess), rng.randint(1, 2))
    about = []
    for topic in topics:
        said_of_it, what = topic(rng, x, y)
        lines += said_of_it
        about.append(what)
    lines += [
        f"Goodbye, {y}. Think of {both(about)}.",
        f"Goodbye, {x}. I will think of {both(about)}.",
    ]
    said = "\n".join(f"{(x, y)[i % 2]}: {line}" for i, line in enumerate(lines))
    return Document("dialogue", f"{x} meets {y}.", "\n" + said, f"Write a dialogue of {x} and {y}.")


def _lost(rng: Random, x: str, y: str) -> Topic:
    color, thing, place = rng.choice(COLORS), rng.choice(THINGS), rng.choice(PLACES)
    return [
        f"I am {rng.choice(MOODS)}. Have you seen my {color} {thing}?",
        f"Your {thing}? {a(f'{color} {thing}').capitalize()} is in the {place}, {x}.",
        f"In the {place}! Thank you, {y}. I need the {thing} on {rng.choice(DAYS)}.",
        f"You should keep your {thing} at home, {x}.",
    ], f"the {color} {thing} in the {place}"


def _meet(rng: Random, x: str, y: str) -> Topic:
    day, place, town = rng.choice(DAYS), rng.choice(PLACES), rng.choice(TOWNS)
    return [
        f"Shall we meet on {day}, {y}?",
        f"Yes, {x}. Where shall we meet on {day}?",
        f"At the {place} in {town}. On {day} it will be {rng.choice(WEATHER)}.",
        f"Good. On {day}, at the {place} in {town}.",
    ], f"{day} at the {place} in {town}"


def _count(rng: Random, x: str, y: str) -> Topic:
    item, had, gave = rng.choice(SMALL), rng.randint(3, 10), rng.randint(1, 2)
    return [
        f"I have {count(had, item)}, {y}. Would you like {NUMBERS[gave]}?",
        f"Yes, please give me {count(gave, item)}, {x}.",
        f"Here you are. Now I have {count(had - gave, item)}.",
        f"And I have {NUMBERS[gave]}. I like {plural(item)}!",
    ], f"the {plural(item)}"


def _guess(rng: Random, x: str, y: str) -> Topic:
    animal, adj, color = rng.choice(ANIMALS), rng.choice(ADJ), rng.choice(COLORS)
    wrong = rng.choice([n for n in ANIMALS if n != animal])
    return [
        f"I saw something {adj} and {color}, {y}. Guess!",
        f"Was it {a(f'{color} {wrong}')}?",
        f"No, {y}, not {a(wrong)}. It was {a(f'{adj} {color} {animal}')}!",
        f"I have never seen {a(f'{color} {animal}')}, {x}.",
    ], f"the {adj} {color} {animal}"
