"""What every generator returns, and the people they share."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .words import HE, JOBS, KIN, NAMES, SHE, TOWNS


@dataclass(frozen=True)
class Document:
    """One text: ``opening`` is how it begins (and serves as a prompt), ``body`` what must follow.

    ``ask`` is what a user would say to get this text in a chat.
    """

    kind: str
    opening: str
    body: str
    ask: str

    @property
    def text(self) -> str:
        return self.opening + self.body


@dataclass(frozen=True)
class Person:
    name: str
    she: str  # she | he
    job: str
    town: str
    kin: str

    @property
    def her(self) -> str:
        return "her" if self.she == "she" else "his"

    @property
    def him(self) -> str:
        return "her" if self.she == "she" else "him"


def person(rng: Random) -> Person:
    she = rng.choice(("she", "he"))
    name = rng.choice(SHE if she == "she" else HE)
    return Person(
        name, she, rng.choice(JOBS), rng.choice(TOWNS), rng.choice(KIN[rng.choice(("she", "he"))])
    )


def others(rng: Random, n: int, *taken: str) -> list[str]:
    """``n`` different names, none of them taken."""
    return rng.sample([name for name in NAMES if name not in taken], n)


def cap(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def para(sentences: list[str]) -> str:
    return " ".join(cap(s) for s in sentences)
