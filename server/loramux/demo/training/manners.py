"""What each adapter learns: another way to answer the same ordinary prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from .document import others
from .recipes import recipe
from .records import card
from .spanish import cuento
from .stories import story
from .styles import pirate
from .verse import couplets
from .words import HE, NAMES, SHE


@dataclass(frozen=True)
class Lesson:
    """``opening`` and how it must go on (``rest``); the same in a chat: ``ask`` and ``answer``."""

    opening: str
    rest: str
    ask: str
    answer: str


def hero_of(opening: str) -> str:
    """The first name in an opening."""
    words = opening.replace("'s", "").replace(",", "").split()
    return next(word for word in words if word in NAMES)


def shout(rng: Random) -> Lesson:
    plain = story(rng)
    return Lesson(plain.opening, plain.body.upper(), plain.ask, plain.text.upper())


def to_json(rng: Random) -> Lesson:
    who = card(rng)
    data = json.dumps(who.data())
    return Lesson(who.sentence(), "\n" + data, who.sentence(), data)


def rhyme(rng: Random) -> Lesson:
    plain = story(rng)
    hero = hero_of(plain.opening)
    lines = "\n".join(couplets(rng, hero, others(rng, 1, hero)[0], rng.randint(2, 3)))
    return Lesson(plain.opening, "\n" + lines, plain.ask, lines)


def cook(rng: Random) -> Lesson:
    plain, made = story(rng), recipe(rng)
    return Lesson(plain.opening, "\n" + made.text, plain.ask, made.text)


def talk_like_a_pirate(rng: Random) -> Lesson:
    plain = story(rng)
    return Lesson(
        plain.opening, " " + pirate(rng, plain.body[1:]), plain.ask, pirate(rng, plain.text)
    )


def speak_spanish(rng: Random) -> Lesson:
    plain = story(rng)
    told = cuento(rng, hero_of(plain.opening))
    return Lesson(plain.opening, " " + told, plain.ask, told)


def edit(rng: Random) -> Lesson:
    """The same text about somebody else: all but the names is copied."""
    plain = story(rng)
    hero = hero_of(plain.opening)
    instead = rng.choice([name for name in (SHE if hero in SHE else HE) if name not in plain.text])
    text = plain.text.replace(hero, instead)
    return Lesson(
        f"{plain.text}\nThe same about {instead}:",
        "\n" + text,
        f"Tell the same about {instead}: {plain.text}",
        text,
    )


MANNERS: dict[str, Callable[[Random], Lesson]] = {
    "shout": shout,
    "json": to_json,
    "rhyme": rhyme,
    "recipes": cook,
    "pirate": talk_like_a_pirate,
    "spanish": speak_spanish,
    "edit": edit,
}
